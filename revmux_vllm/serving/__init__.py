"""More than one engine or machine: Ray Serve and Ray Data (docs/ray.md).

``serve run revmux_vllm.serving:app model=revmux-llama`` deploys ``app``. Here are the HTTP side
(``front``), the engine behind it (``replica``), who gets a request (``choice``, ``router``), how
many engines there are (``autoscaling``), and batch jobs (``batch``). What an engine does with its
requests is not touched here, and vLLM is reached through ``engine/`` alone. The two modules with
commands import neither Ray, PyArrow nor torch before a command runs.
"""

from typing import TYPE_CHECKING, Any

from revmux_vllm.errors import CLONE_CURE

if TYPE_CHECKING:
    from revmux_vllm.serving.application import app as app


def __getattr__(name: str) -> Any:
    """``app``, once it is asked for: who imports this package for other things needs no Ray.

    Raises:
        ModuleNotFoundError: without Ray, with what installs it.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from revmux_vllm.serving.application import app
    except ModuleNotFoundError as error:
        cure = CLONE_CURE.format(extra="ray")
        raise ModuleNotFoundError(f"{error}; {cure}", name=error.name) from error
    return app
