"""What a replica says of itself: to routers, to the autoscaler, and all replicas on one page."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

NAMES = {
    "answered": "revmux:requests_total",
    "arrived": "revmux:arrived_tokens_total",
    "waiting": "revmux:waiting_tokens",
    "widest": "revmux:capacity_tokens_per_second",
}


@dataclass(frozen=True)
class ReplicaStats:
    """One look at a replica.

    Attributes:
        look: counts the looks, so that a router can tell a new one from the old one again.
        chars_per_s: what it can answer at the widest rung that its policy allows, in
            ``Work.chars``; 0 until something was measured.
        load: replicas of this kind that would be fully busy, at the widest rung, with what arrived
            since the last look, and with answering what waits within the horizon.
    """

    look: int = 0
    chars_per_s: float = 0.0
    load: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, as Ray wants them."""
        return asdict(self)


class StatsReader:
    """Makes ``ReplicaStats`` of this process's metrics.

    Args:
        horizon_s: within which what waits should be answered; the scheduler's ``target_ms``.
    """

    def __init__(self, horizon_s: float) -> None:
        self.horizon_s = horizon_s
        self._looks = 0
        self._at = time.monotonic()
        self._arrived = engine_numbers()["arrived"]
        self._chars = self._tokens = 0.0

    def look(self, chars: int, is_idle: bool) -> ReplicaStats:
        """The present state.

        Args:
            chars: of all requests that were ever taken in.
            is_idle: no request is under way. The engine's gauges are of its last step, after which
                waiting requests may have been aborted.
        """
        now, numbers = time.monotonic(), engine_numbers()
        self._looks += 1
        elapsed, self._at = max(now - self._at, 1e-3), now
        rate, self._arrived = (numbers["arrived"] - self._arrived) / elapsed, numbers["arrived"]
        if numbers["arrived"]:
            self._chars, self._tokens = float(chars), numbers["arrived"]
        if not numbers["widest"] or not self._chars:
            return ReplicaStats(self._looks)
        waiting = 0.0 if is_idle else numbers["waiting"]
        return ReplicaStats(
            look=self._looks,
            chars_per_s=numbers["widest"] * self._chars / self._tokens,
            load=(rate + waiting / self.horizon_s) / numbers["widest"],
        )


def engine_numbers() -> dict[str, float]:
    """The metrics of ``NAMES`` in this process, summed over engines; 0 for what is not there."""
    numbers = dict.fromkeys(NAMES, 0.0)
    names = {name.removesuffix("_total") for name in NAMES.values()}
    for family in REGISTRY.collect():
        if family.name not in names:
            continue
        for sample in family.samples:
            for key, name in NAMES.items():
                if sample.name == name and sample.labels.get("at", key) == key:
                    numbers[key] += sample.value
    return numbers


def merge_pages(pages: Mapping[str, str]) -> bytes:
    """Several ``/metrics`` as one, every sample with the label ``replica``.

    Args:
        pages: text by the name of the replica.
    """
    return generate_latest(_Merged(pages))


class _Merged(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        """Families in the order in which they come."""
        merged: dict[str, Any] = {}
        for replica, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                into = merged.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    into.add_sample(
                        sample.name,
                        {**sample.labels, "replica": replica},
                        sample.value,
                        sample.timestamp,
                        sample.exemplar,
                    )
        return merged.values()
