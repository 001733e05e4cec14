"""What the user may set through ``--additional-config '{"revmux": {...}}'``."""

from dataclasses import dataclass
from typing import Any

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung, parse_rungs


@dataclass(frozen=True)
class Policy:
    """Which rungs a step may use.

    Attributes:
        rungs: of the checkpoint's, those allowed at all.
        by_crowd: a rung whose one row stands for N needs N requests in the step; so a request on
            its own gets the backbone's answer, also where merging needs no partner. ``exit`` comes
            after the last of the others.
    """

    rungs: tuple[Rung, ...]
    by_crowd: bool = True

    def allowed(self, num_requests: int) -> tuple[Rung, ...]:
        """Rungs for a step of so many requests."""
        if not self.by_crowd:
            return self.rungs
        most = max((rung.saving for rung in self.rungs if not rung.exit), default=0)
        return tuple(r for r in self.rungs if (most + 1 if r.exit else r.saving) <= num_requests)


def read_policy(additional_config: Any, config: RevMuxConfig) -> Policy:
    """The user's options over a checkpoint.

    ``rungs``: names of those that may be used; none leaves the backbone alone. Default: all but
    ``exit``, which has to be asked for.
    ``max_width``: the widest composite; 1 leaves merging alone. Default: the widest.

    Raises:
        ValueError: for an unknown key or value, with what is known.
    """
    options = additional_config.get("revmux", {}) if isinstance(additional_config, dict) else {}
    where = "--additional-config revmux"
    if not isinstance(options, dict):
        raise ValueError(f"{where}: expected an object, found {options!r}")
    unknown = sorted(set(options) - {"max_width", "rungs"})
    if unknown:
        raise ValueError(
            f"{where}: unknown key {', '.join(unknown)}; known are max_width and rungs"
        )
    names = options.get("rungs", [str(rung) for rung in config.rungs if not rung.exit])
    if not isinstance(names, list):
        raise ValueError(f"{where}.rungs: expected a list, found {names!r}")
    try:
        rungs = parse_rungs(names)
    except ValueError as error:
        raise ValueError(f"{where}.rungs: {error}") from None
    missing = [str(rung) for rung in rungs if rung not in config.rungs]
    if missing:
        raise ValueError(
            f"{where}.rungs: the checkpoint has no {', '.join(missing)}; it has "
            + ", ".join(map(str, config.rungs))
        )
    allowed = sorted({1, *(rung.mux for rung in config.rungs)})
    max_width = options.get("max_width", allowed[-1])
    if max_width not in allowed:
        raise ValueError(f"{where}.max_width: expected one of {allowed}, found {max_width!r}")
    return Policy(tuple(rung for rung in rungs if rung.mux <= max_width))
