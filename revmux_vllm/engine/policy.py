"""What the user may set through ``--additional-config '{"revmux": {...}}'``."""

from typing import Any

from revmux_vllm.config import RevMuxConfig


def read_policy(additional_config: Any, config: RevMuxConfig) -> tuple[int, ...]:
    """The composite widths that the scheduler may use.

    ``max_width``: the widest composite; 1 switches multiplexing off. Default: the checkpoint's
    widest.

    Raises:
        ValueError: for an unknown key or value, with what is known.
    """
    options = additional_config.get("revmux", {}) if isinstance(additional_config, dict) else {}
    unknown = sorted(set(options) - {"max_width"})
    if unknown:
        raise ValueError(
            f"--additional-config revmux: unknown key {', '.join(unknown)}; known are max_width"
        )
    allowed = (1, *config.widths)
    max_width = options.get("max_width", allowed[-1])
    if max_width not in allowed:
        raise ValueError(
            f"--additional-config revmux.max_width: expected one of {list(allowed)}, "
            f"found {max_width!r}"
        )
    return tuple(width for width in config.widths if width <= max_width)
