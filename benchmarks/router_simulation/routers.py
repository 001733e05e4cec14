"""Which replica a front sends a request to: pack-aware, and the alternatives."""

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from revmux_vllm.protocol import CHARS_PER_TOKEN
from revmux_vllm.serving.choice import Load, MeanChars, choose
from revmux_vllm.serving.messages import Work
from router_simulation.setting import Setting
from router_simulation.traffic import Request

ROUTERS = ("pack-aware", "power-of-two", "round-robin")
CACHE_S = 10.0
"""Ray's RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S."""


class Router(Protocol):
    """A front's: chooses, and is told what becomes of its requests."""

    def choose(self, work: Work, now: float) -> int:
        """The replica for ``work``."""
        ...

    def on_send(self, request: Request, now: float) -> None:
        """It was sent to its replica."""

    def on_accept(self, request: Request, number: int, now: float) -> None:
        """Its replica has it, and ``number`` with it."""

    def on_answer(self, request: Request, now: float) -> None:
        """It was answered."""


class WithoutBooks:
    """Forgets what it is told."""

    def on_send(self, request: Request, now: float) -> None:
        """Nothing."""

    def on_accept(self, request: Request, number: int, now: float) -> None:
        """Nothing."""

    def on_answer(self, request: Request, now: float) -> None:
        """Nothing."""


class RoundRobin(WithoutBooks):
    """One after the other, from a random one on."""

    def __init__(self, num_replicas: int, rng: random.Random) -> None:
        self._next, self._num_replicas = rng.randrange(num_replicas), num_replicas

    def choose(self, work: Work, now: float) -> int:
        """The next one."""
        self._next = (self._next + 1) % self._num_replicas
        return self._next


class PowerOfTwo(WithoutBooks):
    """The less busy of two at random.

    Args:
        under_way: the true numbers, those on their way to a replica among them.
    """

    def __init__(self, under_way: Sequence[int], rng: random.Random) -> None:
        self._under_way, self._rng = under_way, rng

    def choose(self, work: Work, now: float) -> int:
        """Whichever holds fewer requests."""
        number = len(self._under_way)
        two = self._rng.sample(range(number), min(2, number))
        return min(two, key=self._under_way.__getitem__)


class PackAware:
    """The books of ``serving/router.py``; every ``Load.elsewhere`` is of its last change."""

    def __init__(
        self, num_replicas: int, chars_per_s: float, fill_s: float, rng: random.Random
    ) -> None:
        self.loads = [Load(chars_per_s) for _ in range(num_replicas)]
        self._order = rng.sample(range(num_replicas), num_replicas)
        self._in_order = [self.loads[replica] for replica in self._order]
        self._mean = MeanChars()
        self._fill_s = fill_s
        self._cache: list[int | None] = [None] * num_replicas
        self._updated = [-math.inf] * num_replicas
        self._updates: deque[tuple[float, int]] = deque()

    def choose(self, work: Work, now: float) -> int:
        """What ``choice.py`` says."""
        while self._updates and now - self._updates[0][0] > CACHE_S:
            at, replica = self._updates.popleft()
            if self._updated[replica] == at:
                self._cache[replica] = None
                self._estimate(replica)
        return self._order[choose(work, self._in_order, self._fill_s)]

    def on_send(self, request: Request, now: float) -> None:
        """Counted from the moment of the choice."""
        self.loads[request.replica].add(request.work)
        self._mean.add(request.work)
        self._update(request.replica, (self._cache[request.replica] or 0) + 1, now)

    def on_accept(self, request: Request, number: int, now: float) -> None:
        """The replica's word replaces the estimate."""
        self._update(request.replica, number, now)

    def on_answer(self, request: Request, now: float) -> None:
        """One less there."""
        self.loads[request.replica].remove(request.work)
        cached = self._cache[request.replica]
        if cached is None:
            self._estimate(request.replica)
        else:
            self._update(request.replica, max(0, cached - 1), now)

    def _update(self, replica: int, number: int, now: float) -> None:
        self._cache[replica], self._updated[replica] = number, now
        self._updates.append((now, replica))
        self._estimate(replica)

    def _estimate(self, replica: int) -> None:
        self.loads[replica].see(self._cache[replica] or 0, self._mean.value)


def make_router(setting: Setting, under_way: Sequence[int], rng: random.Random) -> Router:
    """A front's router, of the kind that ``setting`` names.

    Args:
        under_way: requests at every replica, and on their way there, kept up to date.
    """
    if setting.router == "round-robin":
        return RoundRobin(setting.replicas, rng)
    if setting.router == "power-of-two":
        return PowerOfTwo(under_way, rng)
    chars_per_s = CHARS_PER_TOKEN * setting.calibration.tokens_per_s
    return PackAware(setting.replicas, chars_per_s, setting.fill_s, rng)
