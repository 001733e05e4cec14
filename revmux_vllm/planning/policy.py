"""Which rungs a step may use.

``load`` asks one question at every step: can all that waits, and all that will come within the
horizon, be answered within the horizon? The rung that saves least and still can is used, so light
load gets the backbone's own answers and heavy load a queue that does not grow.
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

    def __init__(self, rungs: tuple[Rung, ...], costs: LayerCosts) -> None:
        self._rungs = rungs
        self._saving = max(map(costs.saving, rungs), default=1.0)

    @property
    def savings(self) -> tuple[float, float]:
        """Both are the cheapest rung's."""
        return self._saving, self._saving

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
    def savings(self) -> tuple[float, float]:
        """Of the level, and of the highest one."""
        return self.costs.saving(self.levels[self.level]), self.costs.saving(self.levels[-1])

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
        """Part of the horizon that it takes to answer what waits and what will come.

        Until a step was measured a token through all layers takes its part of ``ASSUMED_STEPS``
        steps, and nothing else takes time: so a burst is multiplexed, and a lone request is not.
        """
        tokens = backlog.num_tokens + backlog.tokens_per_s * self.horizon_s
        requests = backlog.num_requests * tokens / max(1.0, backlog.num_tokens)
        most = self.budgets
        num_steps = math.ceil(max(tokens / most.max_tokens, requests / most.max_requests))
        rows = tokens / self.costs.saving(self.levels[level])
        if not self.costs.known:
            return self.costs.whole_tokens(tokens, rows) / (ASSUMED_STEPS * most.max_tokens)
        return self.costs.seconds(tokens, rows, num_steps) / self.horizon_s


def make_policy(
    config: RevMuxConfig, options: Options, costs: LayerCosts, budgets: Budgets
) -> Policy:
    """The policy that ``options`` name."""
    if options.policy == "load":
        return ByLoad(config, options, costs, budgets)
    rung = Rung() if options.policy == "off" else fixed_rung(options)
    return Fixed(tuple(r for r in config.kind(rung) if r in options.rungs), costs)
