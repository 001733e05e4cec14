"""What a step costs and how much work arrives: measured while serving. Plain Python.

The model of a step is ``overhead + layers x (a + b x rows)``: every layer costs the same, a fixed
part and a part for every row. Lower layers see one row for a token and upper ones fewer, so every
step is two measurements of the same line. Attention's quadratic part is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from revmux_vllm.rungs import Rung

FORGET = 0.98
"""Weight that a measurement keeps when the next one comes: the last fifty or so count."""
RIDGE = 0.02
"""How firmly ``a`` is held at zero, so that steps of nearly equal size cannot tilt the line."""


class LayerCosts:
    """The line, fitted to the stages of the last steps, and the overhead beside it.

    Args:
        prefill_layers: lower layers l.
        num_layers: all layers L.
        savings: of rungs whose saving is not a matter of layers alone.
    """

    def __init__(
        self, prefill_layers: int, num_layers: int, savings: Mapping[Rung, float] | None = None
    ) -> None:
        self._savings = dict(savings or {})
        self.lower, self.upper = prefill_layers, num_layers - prefill_layers
        self.overhead_s = 0.0
        # Of the measurements, weighted: their number, x, y, x squared, and x times y.
        self._sums = [0.0] * 5
        self._seen_overhead = False

    def saving(self, rung: Rung) -> float:
        """How many times less the upper layers compute for a rung."""
        if rung in self._savings:
            return self._savings[rung]
        return rung.saving(self.lower, self.lower + self.upper)

    @property
    def known(self) -> bool:
        """Whether anything was measured yet."""
        return self._sums[0] > 0

    def observe(self, num_layers: int, rows: float, seconds: float) -> None:
        """So many layers took so long over so many rows each."""
        if rows <= 0 or num_layers < 1:
            return
        y = seconds / num_layers
        new = (1.0, rows, y, rows**2, rows * y)
        self._sums = [FORGET * old + own for old, own in zip(self._sums, new, strict=True)]

    def observe_pass(self, tokens: int, rows: float, lower_s: float, upper_s: float) -> None:
        """A forward pass took so long below the cut, over tokens, and above it, over rows: the
        mean of all upper layers, where some rows stop earlier."""
        self.observe(self.lower, tokens, lower_s)
        self.observe(self.upper, rows, upper_s)

    def observe_overhead(self, seconds: float) -> None:
        """A step took so much longer than its layers."""
        share = 0.1 if self._seen_overhead else 1.0
        self.overhead_s += share * (max(0.0, seconds) - self.overhead_s)
        self._seen_overhead = True

    def per_layer(self) -> tuple[float, float]:
        """``a`` and ``b``: seconds of a layer, and of a layer and row; neither negative."""
        n, x, y, xx, xy = self._sums
        held = n * (1 + RIDGE)
        a = (y * xx - x * xy) / (held * xx - x**2)
        b = (held * xy - x * y) / (held * xx - x**2)
        if a < 0:
            return 0.0, xy / xx
        if b < 0:
            return y / n, 0.0
        return a, b

    def seconds(self, tokens: float, rows: float, num_steps: int = 1) -> float:
        """Time for ``tokens`` that become ``rows`` above the cut, in so many steps."""
        if not self.known:
            return 0.0
        a, b = self.per_layer()
        fixed = self.overhead_s + a * (self.lower + self.upper)
        return num_steps * fixed + b * (self.lower * tokens + self.upper * rows)

    def whole_tokens(self, tokens: float, rows: float) -> float:
        """``tokens`` below the cut and ``rows`` above it, as tokens that run through all layers."""
        return (self.lower * tokens + self.upper * rows) / (self.lower + self.upper)

    def tokens_per_s(self, saving: float, step_tokens: int) -> float:
        """What full steps of ``step_tokens`` answer per second at a rung; 0 until it is known."""
        seconds = self.seconds(step_tokens, step_tokens / saving)
        return step_tokens / seconds if seconds else 0.0


class ArrivalRate:
    """Tokens that arrive per second, over about the last ``horizon_s``."""

    def __init__(self, horizon_s: float, now: float) -> None:
        self.horizon_s = horizon_s
        self.tokens_per_s = 0.0
        self._since = now
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """So many arrived."""
        self._tokens += tokens

    def forget(self, now: float) -> None:
        """What came before does not count any more, but for those that have just arrived."""
        self.tokens_per_s, self._since = 0.0, now

    def update(self, now: float) -> float:
        """The rate at ``now``, seconds on the clock of the constructor's."""
        elapsed = now - self._since
        if elapsed > 0:
            share = 1 - math.exp(-elapsed / self.horizon_s)
            self.tokens_per_s += share * (self._tokens / elapsed - self.tokens_per_s)
            self._since, self._tokens = now, 0
        return self.tokens_per_s


@dataclass(frozen=True)
class Backlog:
    """What waits, and what comes.

    Attributes:
        num_requests: that wait.
        num_tokens: of them.
        tokens_per_s: that arrive.
    """

    num_requests: int
    num_tokens: float
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class Budgets:
    """Of one step.

    Attributes:
        max_tokens: tokens of all its sequences.
        max_requests: sequences.
    """

    max_tokens: int
    max_requests: int
