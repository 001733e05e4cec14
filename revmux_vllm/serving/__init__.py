"""More than one machine: Ray Serve (docs/ray.md).

``serve run revmux_vllm.serving:app model=revmux-llama`` deploys ``app``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revmux_vllm.serving.application import app as app

RAY_IS_MISSING = (
    "Ray is not installed; in a clone of this repository `pip install -e '.[ray]'` cures it"
)


def __getattr__(name: str) -> Any:
    """``app``, once it is asked for: whoever imports this package for other things needs no Ray."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from revmux_vllm.serving.application import app
    except ImportError as error:
        raise ImportError(f"{RAY_IS_MISSING} ({error})") from error
    return app
