"""Which rungs a step may use.

``load`` asks one question at every step: can all that waits, and all that will come within the
horizon, be answered within the horizon? The rung that saves least and still can is used, so light
load gets the backbone's own answers and heavy load a queue that does not grow. How long a rung
takes depends on the texts: the longer they are, the more does merging save beside multiplexing.
"""

import math
from typing import Protocol

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.costs import Backlog, Budgets, LayerCosts
from revmux_vllm.planning.options import Options, fixed_rung
from revmux_vllm.rungs import Rung

WINDOW = 1024
"""Most waiting requests that are looked at for partners."""
NARROW_AT = 0.6
"""Share of the horizon that a narrower rung must be content with, so that rungs do not flap."""
ASSUMED_STEPS = 10
"""Full steps of the backbone alone that fill the horizon, until a step was measured."""


class Policy(Protocol):
    """Decides the rungs of a step.

    Attributes:
        window: most waiting requests to choose from now.
        alone_because: what to call it when the backbone alone was chosen.
        defers: whether a request without partners may wait while another composite runs, once.
        levels: rungs that may come into use.
    """

    alone_because: str
    defers: bool
    levels: list[Rung]

    @property
    def window(self) -> int: ...

    @property
    def in_use(self) -> Rung:
        """One of ``levels``."""
        ...

    def rungs(self, backlog: Backlog) -> tuple[Rung, ...]:
        """Rungs that the step may use; none is the backbone alone."""
        ...


class Fixed:
    """Always the cheapest of these rungs, and the narrower ones for what it leaves over."""

    window = WINDOW
    alone_because = "policy"
    defers = False

    def __init__(self, rungs: tuple[Rung, ...], costs: LayerCosts) -> None:
        self._rungs = rungs
        self.in_use = max(rungs, key=costs.saving, default=Rung())
        self.levels = [self.in_use]

    def rungs(self, backlog: Backlog) -> tuple[Rung, ...]:
        """The same ones whatever waits."""
        return self._rungs


class ByLoad:
    """The rung that saves least and keeps up. See the module's docstring.

    Args:
        config: of the checkpoint.
        options: of the user.
        costs: that are being measured.
        budgets: of one step.
    """

    window = WINDOW
    alone_because = "light_load"
    defers = True

    def __init__(
        self,
        config: RevMuxConfig,
        options: Options,
        costs: LayerCosts,
        budgets: Budgets,
    ) -> None:
        self.config, self.options, self.costs, self.budgets = config, options, costs, budgets
        self.horizon_s = options.target_ms / 1000
        # Where two save as much the one that needs fewer partners is used.
        widest_first = sorted((Rung(), *options.rungs), key=lambda rung: -rung.mux)
        by_saving = {costs.saving(rung): rung for rung in widest_first}
        levels = [by_saving[saving] for saving in sorted(by_saving)]
        self.levels = [r for r in levels if costs.saving(r) >= options.min_width] or levels[-1:]
        self.level = 0

    @property
    def in_use(self) -> Rung:
        """Of the level."""
        return self.levels[self.level]

    def rungs(self, backlog: Backlog) -> tuple[Rung, ...]:
        """Widen at once when the horizon is missed; narrow with room to spare, or where that is
        faster."""
        shares = [self._share(rung, backlog) for rung in self.levels]
        own = shares[self.level]
        if own > 1:
            enough = (level for level, share in enumerate(shares) if share <= 1)
            fastest = max(range(len(shares)), key=lambda level: (-shares[level], level))
            self.level = next(enough, fastest)
        else:
            narrower = enumerate(shares[: self.level])
            content = (level for level, share in narrower if share <= NARROW_AT or share < own)
            self.level = next(content, self.level)
        kind = self.config.kind(self.in_use)
        return tuple(rung for rung in kind if rung in self.options.rungs)

    def _share(self, rung: Rung, backlog: Backlog) -> float:
        """Part of the horizon that it takes at a rung to answer what waits and what will come.

        Until a step was measured a token through all layers takes its part of ``ASSUMED_STEPS``
        steps, and nothing else takes time: so a burst is multiplexed, and a lone request is not.
        """
        tokens = backlog.num_tokens + backlog.tokens_per_s * self.horizon_s
        requests = backlog.num_requests * tokens / max(1.0, backlog.num_tokens)
        most = self.budgets
        num_steps = math.ceil(max(tokens / most.max_tokens, requests / most.max_requests))
        if not self.costs.known:
            rows = tokens / self.costs.saving(rung)
            return self.costs.whole_tokens(tokens, rows) / (ASSUMED_STEPS * most.max_tokens)
        return self.costs.seconds_at(rung, tokens, backlog.length, num_steps) / self.horizon_s


def make_policy(
    config: RevMuxConfig, options: Options, costs: LayerCosts, budgets: Budgets
) -> Policy:
    """The policy that ``options`` name."""
    if options.policy == "load":
        return ByLoad(config, options, costs, budgets)
    rung = Rung() if options.policy == "off" else fixed_rung(options)
    return Fixed(tuple(r for r in config.kind(rung) if r in options.rungs), costs)
