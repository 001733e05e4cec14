"""Whether an accuracy contract still meets the traffic it was calibrated for. Plain Python."""

import math
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from revmux_vllm.planning.contract import Contract
from revmux_vllm.rungs import Rung

WINDOW = 500
"""Requests under the contract that are compared with the calibration's rows at a time."""
DEVIATIONS = 4.75
"""Standard deviations that are too many: by chance one window in a million has them."""
CONFIDENCE_DEVIATIONS = 1.96
TRUST_EDGES = (-2, 0, 1, 2, 3, 4, 5, 6, 8)
"""Between which trusts are counted, in log odds."""
TRUST_NAMES = (
    f"below {TRUST_EDGES[0]}",
    *(f"{low} to {high}" for low, high in pairwise(TRUST_EDGES)),
    f"from {TRUST_EDGES[-1]}",
)


class Drift:
    """Compares where requests leave with where the calibration's rows left.

    Args:
        contract: with the shares that its calibration saw.

    Attributes:
        degree: how far the last whole window was off; from 1 on it is an alarm.
    """

    def __init__(self, contract: Contract) -> None:
        self.names = [*map(str, contract.stops), str(Rung())]
        shares = [*contract.shares, max(0.0, 1 - sum(contract.shares))]
        self._seen = [share * contract.rows for share in shares]
        self._window: Counter[str] = Counter()
        self.degree = 0.0

    def observe(self, left: Mapping[str, int]) -> bool:
        """So many left where; True when a window has just ended in an alarm, and the last did
        not."""
        self._window.update(left)
        if self._window.total() < WINDOW:
            return False
        before = self.degree
        self.degree = self._compare([self._window[name] for name in self.names])
        self._window.clear()
        return self.degree >= 1 > before

    def _compare(self, counts: list[int]) -> float:
        """Chi-square of the two samples over what is too much of it; rare places go together."""
        pairs = sorted(zip(counts, self._seen, strict=True), key=sum)
        while len(pairs) > 2 and sum(pairs[0]) < 10:
            (a, b), (c, d), *rest = pairs
            pairs = sorted([(a + c, b + d), *rest], key=sum)
        here, there = (sum(column) for column in zip(*pairs, strict=True))
        found = sum(
            (math.sqrt(there / here) * own - math.sqrt(here / there) * seen) ** 2 / (own + seen)
            for own, seen in pairs
            if own + seen
        )
        return found / too_much(len(pairs) - 1)


def too_much(freedom: int) -> float:
    """Chi-square of ``DEVIATIONS``, by the approximation of Wilson and Hilferty (1931)."""
    ninth = 2 / (9 * max(1, freedom))
    return float(max(1, freedom) * (1 - ninth + DEVIATIONS * math.sqrt(ninth)) ** 3)


def interval(hits: int, count: int) -> tuple[float, float]:
    """Share of ``hits`` with confidence 0.95 (Wilson, 1927); 0 to 1 of nothing."""
    if not count:
        return 0.0, 1.0
    z2 = CONFIDENCE_DEVIATIONS**2
    middle = (hits + z2 / 2) / (count + z2)
    spread = math.sqrt(hits * (count - hits) / count + z2 / 4)
    spread *= CONFIDENCE_DEVIATIONS / (count + z2)
    share = hits / count  # inside, whatever rounding does
    return max(0.0, min(share, middle - spread)), min(1.0, max(share, middle + spread))
