"""What a step costs and how much work arrives: measured while serving. Plain Python.

The model of a step is ``overhead + layers x (a + b x rows + c x pairs)``: every layer costs the
same, a fixed part, a part for every row, and one for every pair of a row and one that it may attend
to. Lower layers see one row for a token and upper ones fewer, so every step is two measurements. Of
a sequence there are as many pairs as the square of its rows, or a window allows: ``merge:N`` leaves
one in N squared of a text, ``mux:N`` one in N.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from revmux_vllm.rungs import Rung

FORGET = 0.98
"""Weight that a measurement keeps when the next one comes: the last fifty or so count."""
RIDGES = 0.02, 0.0, 0.001
"""How firmly ``a``, ``b`` and ``c`` are held at zero, so that steps that are nearly alike cannot
tilt the plane: what they do not tell apart counts as the rows'."""
PARTS = ((1,), (0,), (0, 1), (1, 2), (0, 1, 2))
"""Which of ``a``, ``b`` and ``c`` may be all there is."""


class Pairs(NamedTuple):
    """Rows of a step with those that they may attend to, over some layers together.

    Attributes:
        lower: below the cut.
        upper: above it.
        alone: above it, were every sequence alone.
    """

    lower: float = 0.0
    upper: float = 0.0
    alone: float = 0.0


def reaches(windows: Iterable[int | None]) -> Counter[float]:
    """How many of some layers allow a row how many others: a window to either side of it.

    Causal layers have one side alone, of windows and of whole sequences: half of all pairs.

    Args:
        windows: of every layer, as ``attention_windows`` has them; None: there is none.
    """
    return Counter(math.inf if window is None else 2 * window for window in windows)


def num_pairs(rows: Iterable[tuple[float, float]], layers: Mapping[float, int]) -> float:
    """Pairs over some layers together.

    Args:
        rows: how many, and how many there are in their sequence.
        layers: see ``reaches``.
    """
    rows = list(rows)
    return sum(
        count * sum(own * min(others, reach) for own, others in rows)
        for reach, count in layers.items()
    )


class LayerCosts:
    """The plane, fitted to the stages of the last steps, and the overhead beside it.

    Args:
        prefill_layers: lower layers l.
        num_layers: all layers L.
        savings: of rungs whose saving is not a matter of layers alone.
        windows: of every layer; see ``reaches``. Default: none has one.
    """

    def __init__(
        self,
        prefill_layers: int,
        num_layers: int,
        savings: Mapping[Rung, float] | None = None,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        self._savings = dict(savings or {})
        self.lower, self.upper = prefill_layers, num_layers - prefill_layers
        windows = windows or [None] * num_layers
        self._below, self._above = reaches(windows[: self.lower]), reaches(windows[self.lower :])
        self.overhead_s = 0.0
        # Of the measurements, weighted: every product of two of 1, rows, pairs and seconds.
        self._sums = [[0.0] * 4 for _ in range(4)]
        self._plane: tuple[float, float, float] | None = None
        self._seen_overhead = False

    def saving(self, rung: Rung) -> float:
        """How many times less rows the upper layers have for a rung."""
        if rung in self._savings:
            return self._savings[rung]
        return rung.saving(self.lower, self.lower + self.upper)

    @property
    def known(self) -> bool:
        """Whether anything was measured yet."""
        return self._sums[0][0] > 0

    def observe(self, num_layers: int, rows: float, seconds: float, pairs: float = 0.0) -> None:
        """So many layers took so long over so many rows each, and pairs of them all together."""
        if rows <= 0 or num_layers < 1:
            return
        new = (1.0, rows, pairs / num_layers, seconds / num_layers)
        self._sums = [
            [FORGET * old + own * other for old, other in zip(line, new, strict=True)]
            for line, own in zip(self._sums, new, strict=True)
        ]
        self._plane = None

    def observe_pass(
        self, tokens: int, rows: float, lower_s: float, upper_s: float, pairs: Pairs | None = None
    ) -> None:
        """A forward pass took so long below the cut, over tokens, and above it, over rows: the
        mean of all upper layers, where some rows stop earlier. Without ``pairs`` nothing attended
        to anything."""
        pairs = pairs or Pairs()
        self.observe(self.lower, tokens, lower_s, pairs.lower)
        self.observe(self.upper, rows, upper_s, pairs.upper)

    def observe_overhead(self, seconds: float) -> None:
        """A step took so much longer than its layers."""
        share = 0.1 if self._seen_overhead else 1.0
        self.overhead_s += share * (max(0.0, seconds) - self.overhead_s)
        self._seen_overhead = True

    def pairs(self, groups: Iterable[tuple[Rung, Sequence[tuple[float, float]]]]) -> Pairs:
        """Of a step.

        Args:
            groups: rung of every composite, and of its members, carrier first, how many tokens run,
                and how many rows of its sequence they may attend to.
        """
        groups = list(groups)
        members = [member for _, group in groups for member in group]
        shares: dict[Rung, tuple[float, float]] = {}
        upper = []
        for rung, group in groups:
            if rung not in shares:  # rows of a token, in a layer on average, and of one that passes
                shares[rung] = rung.mux / self.saving(rung), 1 / rung.shortening
            (tokens, others), (mean, passing) = group[0], shares[rung]
            upper.append((tokens * mean, others * passing))
        return Pairs(
            num_pairs(members, self._below),
            num_pairs(upper, self._above),
            num_pairs(members, self._above),
        )

    def per_layer(self) -> tuple[float, float, float]:
        """``a``, ``b`` and ``c``: seconds of a layer, of a layer and row, and of a layer and pair;
        none negative."""
        if self._plane is None:
            fits = [(part, self._fit(part)) for part in PARTS]
            possible = [fit for fit in fits if min(fit[1]) >= 0]
            part, values = max(possible, key=self._explained)
            plane = dict(zip(part, values, strict=True))
            self._plane = plane.get(0, 0.0), plane.get(1, 0.0), plane.get(2, 0.0)
        return self._plane

    def _fit(self, part: Sequence[int]) -> list[float]:
        """Least squares of some of ``a``, ``b`` and ``c``, by elimination; -1 where one of them was
        never there."""
        table = [[self._sums[i][j] for j in (*part, 3)] for i in part]
        for i, which in enumerate(part):
            table[i][i] *= 1 + RIDGES[which]
        for i, line in enumerate(table):
            if line[i] <= 0:
                return [-1.0]
            line[:] = [value / line[i] for value in line]
            for other in table:
                if other is not line:
                    share = other[i]
                    other[:] = [a - share * b for a, b in zip(other, line, strict=True)]
        return [line[-1] for line in table]

    def _explained(self, fit: tuple[Sequence[int], Sequence[float]]) -> float:
        """Of the squares of the seconds."""
        return sum(value * self._sums[i][3] for i, value in zip(*fit, strict=True))

    def seconds(self, tokens: float, rows: float, num_steps: int = 1, pairs: float = 0.0) -> float:
        """Time for ``tokens`` that become ``rows`` above the cut, in so many steps, and for so many
        ``pairs`` of all layers together."""
        if not self.known:
            return 0.0
        a, b, c = self.per_layer()
        fixed = self.overhead_s + a * (self.lower + self.upper)
        return num_steps * fixed + b * (self.lower * tokens + self.upper * rows) + c * pairs

    def seconds_at(self, rung: Rung, tokens: float, length: float, num_steps: int = 1) -> float:
        """Time for ``tokens`` of texts of ``length`` at a rung."""
        rows = tokens / self.saving(rung)
        pairs = num_pairs([(tokens, length)], self._below)
        pairs += num_pairs([(rows, length / rung.shortening)], self._above)
        return self.seconds(tokens, rows, num_steps, pairs)

    def whole_tokens(self, tokens: float, rows: float) -> float:
        """``tokens`` below the cut and ``rows`` above it, as tokens that run through all layers."""
        return (self.lower * tokens + self.upper * rows) / (self.lower + self.upper)

    def tokens_per_s(self, rung: Rung, step_tokens: int, length: float = 0.0) -> float:
        """What full steps of texts of ``length`` answer per second at a rung, ``step_tokens`` each;
        0 until it is known."""
        seconds = self.seconds_at(rung, step_tokens, length)
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
        length: of the text that a token is of, on average.
    """

    num_requests: int
    num_tokens: float
    tokens_per_s: float = 0.0
    length: float = 0.0


@dataclass(frozen=True)
class Budgets:
    """Of one step.

    Attributes:
        max_tokens: tokens of all its sequences.
        max_requests: sequences.
    """

    max_tokens: int
    max_requests: int
