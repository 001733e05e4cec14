"""Which replica gets a request. Plain Python: the router and the simulation both ask here.

Composites need partners that wait at the same time at the same replica. So one replica is filled to
its best packing before the next is opened. A replica is *full* when the work it holds would take
``fill_s`` at its widest rung; the next is opened only then, and when all are full the one that will
be done first is chosen.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from revmux_vllm.serving.messages import Work

MEAN_OVER = 1000


@dataclass
class Load:
    """What one replica holds, as far as a router knows.

    Attributes:
        chars_per_s: what it can answer at its widest rung, in ``Work.chars``.
        chars: of the requests it holds.
        kinds: how many of these it holds of each ``Work.kind``.
        elsewhere: part of ``chars`` that other routers sent, estimated.
    """

    chars_per_s: float
    chars: float = 0.0
    kinds: Counter[str | int] = field(default_factory=Counter)
    elsewhere: float = 0.0

    def add(self, work: Work) -> None:
        """One more request."""
        self.chars += work.chars
        self.kinds[work.kind] += 1

    def remove(self, work: Work) -> None:
        """One of them was answered, or given up."""
        self.chars -= work.chars
        self.kinds[work.kind] -= 1

    def see(self, under_way: int, mean_chars: float) -> None:
        """Of ``under_way`` requests there, those that other routers sent are of this mean."""
        self.elsewhere = max(0, under_way - self.kinds.total()) * mean_chars

    @property
    def backlog_s(self) -> float:
        """Time that its work will take at the widest rung."""
        return (self.chars + self.elsewhere) / self.chars_per_s


@dataclass
class MeanChars:
    """Of the latest requests that a router sent: its guess at what others send."""

    value: float = 1.0
    number: int = 0

    def add(self, work: Work) -> None:
        """One more; the last ``MEAN_OVER`` count, the older of them less."""
        self.number = min(self.number + 1, MEAN_OVER)
        self.value += (work.chars - self.value) / self.number


def choose(work: Work, loads: Sequence[Load], fill_s: float) -> int:
    """Index of the replica for ``work``.

    In this order: the open replica with the most partners for it, of those with room; the first
    open one with room; the first that holds nothing; the one that will be done first. *First* is
    the order of ``loads``: the same at every call, and another one in every router, because what
    they know of each other is late, and all would fill the same replica at once.

    Args:
        work: of the request.
        loads: of all replicas, at least one, with known ``chars_per_s``.
        fill_s: seconds of work at the widest rung that fill a replica.
    """
    best, most, empty = None, 0, None
    for i, load in enumerate(loads):
        backlog_s = load.backlog_s
        if backlog_s <= 0:
            empty = i if empty is None else empty
        elif backlog_s + work.chars / load.chars_per_s <= fill_s:
            partners = load.kinds[work.kind]
            if best is None or partners > most:
                best, most = i, partners
    if best is not None:
        return best
    if empty is not None:
        return empty
    return min(range(len(loads)), key=lambda i: loads[i].backlog_s)
