"""Which rungs a step may use, and what the user may say about it.

``load`` asks one question at every step: can all that waits, and all that will come within the
horizon, be answered within the horizon? The rung that saves least and still can is used, so light
load gets the backbone's own answers and heavy load a queue that does not grow.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.costs import Backlog, LayerCosts
from revmux_vllm.rungs import Rung, parse_rungs

WINDOW = 1024
"""Most waiting requests that are looked at for partners."""
NARROW_AT = 0.6
"""Share of the horizon that a narrower rung must be content with, so that rungs do not flap."""
WHERE = "--additional-config revmux"


@dataclass(frozen=True)
class Options:
    """``--additional-config '{"revmux": {...}}'``.

    Attributes:
        policy: ``load``, ``off`` (the backbone alone), ``fixed:N`` (composites as wide as N) or
            ``fixed:RUNG`` by name, such as ``fixed:merge:2``.
        rungs: of the checkpoint's, those allowed at all; none leaves the backbone alone. Default:
            all but ``exit``, which has to be asked for.
        min_width: ``load`` saves at least this much, also when nobody else waits.
        max_width: the widest composite; 1 leaves merging alone. Default: the widest.
        target_ms: horizon of ``load``.
        linger_ms: longest time that a request waits for partners at a composite's rung.
        isolate: a request without a ``cache_salt`` shares composites with nobody.
    """

    policy: str = "load"
    rungs: tuple[Rung, ...] = ()
    min_width: int = 1
    max_width: int = 1
    target_ms: float = 1000.0
    linger_ms: float = 0.0
    isolate: bool = False


class Policy(Protocol):
    """Decides the rungs of a step.

    Attributes:
        window: most waiting requests to choose from now.
        alone_because: what to call it when the backbone alone was chosen.
        defers: whether a request without partners may wait while another composite runs, once.
    """

    alone_because: str
    defers: bool

    @property
    def window(self) -> int: ...

    @property
    def savings(self) -> tuple[float, float]:
        """Of the rung in use, and of the cheapest that may come into use."""
        ...

    def rungs(self, backlog: Backlog) -> tuple[Rung, ...]:
        """Rungs that the step may use; none is the backbone alone."""
        ...


class Fixed:
    """Always the cheapest of these rungs, and the narrower ones for what it leaves over."""

    window = WINDOW
    alone_because = "policy"
    defers = False

    def __init__(self, rungs: tuple[Rung, ...]) -> None:
        self._rungs = rungs

    @property
    def savings(self) -> tuple[float, float]:
        """Both are the cheapest rung's."""
        cheapest = max((rung.saving for rung in self._rungs), default=1)
        return cheapest, cheapest

    def rungs(self, backlog: Backlog) -> tuple[Rung, ...]:
        """The same ones whatever waits."""
        return self._rungs


class ByLoad:
    """The rung that saves least and keeps up. See the module's docstring.

    Args:
        config: of the checkpoint.
        options: of the user.
        costs: that are being measured.
        max_tokens, max_requests: of one step.
    """

    alone_because = "light_load"
    defers = True

    def __init__(
        self,
        config: RevMuxConfig,
        options: Options,
        costs: LayerCosts,
        max_tokens: int,
        max_requests: int,
    ) -> None:
        self.config, self.options, self.costs = config, options, costs
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self.horizon_s = options.target_ms / 1000
        # Where two save as much the one that merges more is used: it needs fewer partners.
        by_saving = {rung.saving: rung for rung in sorted((Rung(), *options.rungs))}
        levels = [by_saving[saving] for saving in sorted(by_saving)]
        self.levels = [r for r in levels if r.saving >= options.min_width] or levels[-1:]
        self.level = 0

    @property
    def window(self) -> int:
        """One until a step was measured: the first request of all runs by itself."""
        return WINDOW if self.costs.known else 1

    @property
    def savings(self) -> tuple[float, float]:
        """Of the level, and of the highest one."""
        return self.levels[self.level].saving, self.levels[-1].saving

    def rungs(self, backlog: Backlog) -> tuple[Rung, ...]:
        """Widen at once when the horizon is missed, narrow with room to spare."""
        if self._share(self.level, backlog) > 1:
            self.level = self._first(backlog, limit=1)
        else:
            self.level = min(self.level, self._first(backlog, limit=NARROW_AT))
        kind = self.config.kind(self.levels[self.level])
        return tuple(rung for rung in kind if rung in self.options.rungs)

    def _first(self, backlog: Backlog, limit: float) -> int:
        shares = [self._share(level, backlog) for level in range(len(self.levels))]
        return next((i for i, share in enumerate(shares) if share <= limit), len(shares) - 1)

    def _share(self, level: int, backlog: Backlog) -> float:
        """Part of the horizon that it takes to answer what waits and what will come."""
        tokens = backlog.num_tokens + backlog.tokens_per_s * self.horizon_s
        requests = backlog.num_requests * tokens / max(1.0, backlog.num_tokens)
        num_steps = math.ceil(max(tokens / self.max_tokens, requests / self.max_requests))
        rows = tokens / self.levels[level].saving
        return self.costs.seconds(tokens, rows, num_steps) / self.horizon_s


def make_policy(
    config: RevMuxConfig, options: Options, costs: LayerCosts, max_tokens: int, max_requests: int
) -> Policy:
    """The policy that ``options`` name."""
    if options.policy == "load":
        return ByLoad(config, options, costs, max_tokens, max_requests)
    rung = Rung() if options.policy == "off" else _fixed_rung(options)
    return Fixed(tuple(r for r in config.kind(rung) if r in options.rungs))


def read_options(additional_config: Any, config: RevMuxConfig) -> Options:
    """The user's options over a checkpoint.

    Raises:
        ValueError: for an unknown key or value, with what is known.
    """
    given = additional_config.get("revmux", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, dict):
        raise ValueError(f"{WHERE}: expected an object, found {given!r}")
    known = sorted(Options.__dataclass_fields__)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{WHERE}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    widths = sorted({1, *(rung.mux for rung in config.rungs)})
    max_width = given.get("max_width", widths[-1])
    _expect(max_width in widths and not isinstance(max_width, bool), "max_width", widths, max_width)
    savings = sorted({1, *(int(r.saving) for r in config.rungs if not r.exit)})
    min_width = given.get("min_width", 1)
    _expect(isinstance(min_width, int) and min_width in savings, "min_width", savings, min_width)
    for key, above in (("target_ms", ", above 0"), ("linger_ms", "")):
        value = given.get(key, 1.0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value < 0 or (above and not value):
            raise ValueError(f"{WHERE}.{key}: expected milliseconds{above}, found {value!r}")
    if not isinstance(given.get("isolate", False), bool):
        raise ValueError(f"{WHERE}.isolate: expected true or false, found {given['isolate']!r}")
    rungs = tuple(r for r in _read_rungs(given, config) if r.mux <= max_width)
    options = Options(**given | {"rungs": rungs, "max_width": max_width})
    if options.policy not in ("load", "off"):
        _fixed_rung(options)
    return options


def _read_rungs(given: dict[str, Any], config: RevMuxConfig) -> tuple[Rung, ...]:
    names = given.get("rungs", [str(rung) for rung in config.rungs if not rung.exit])
    if not isinstance(names, list):
        raise ValueError(f"{WHERE}.rungs: expected a list, found {names!r}")
    try:
        rungs = parse_rungs(names)
    except ValueError as error:
        raise ValueError(f"{WHERE}.rungs: {error}") from None
    missing = [str(rung) for rung in rungs if rung not in config.rungs]
    if missing:
        raise ValueError(
            f"{WHERE}.rungs: the checkpoint has no {', '.join(missing)}; it has "
            + ", ".join(map(str, config.rungs))
        )
    return rungs


def _fixed_rung(options: Options) -> Rung:
    kind, _, name = str(options.policy).partition(":")
    names = {str(rung): rung for rung in options.rungs}
    names |= {str(rung.mux): rung for rung in options.rungs if rung.merge == 1 and rung.mux > 1}
    if kind != "fixed" or name not in names:
        choices = ["load", "off", *(f"fixed:{choice}" for choice in names)]
        raise ValueError(
            f"{WHERE}.policy: expected one of {', '.join(choices)}, found {options.policy!r}"
        )
    return names[name]


def _expect(holds: bool, key: str, choices: list[int], found: Any) -> None:
    if not holds:
        raise ValueError(f"{WHERE}.{key}: expected one of {choices}, found {found!r}")
