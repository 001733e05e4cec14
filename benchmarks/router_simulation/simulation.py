"""Fronts and replicas under traffic: discrete events, and what is measured of them."""

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from router_simulation.engine import Engine
from router_simulation.routers import Router, make_router
from router_simulation.setting import WARM_UP_S, Setting
from router_simulation.traffic import Request, Traffic


@dataclass
class Tally:
    """What was measured: requests that came, and steps that began, after the warm-up.

    Attributes:
        latencies_s: of requests, from front to front.
        answered: while traffic lasted.
        rungs: requests by rung.
        composites: sequences in the upper layers.
        busy_s: of all engines.
    """

    latencies_s: list[float] = field(default_factory=list)
    answered: int = 0
    rungs: Counter[str] = field(default_factory=Counter)
    composites: int = 0
    busy_s: float = 0.0


class Simulation:
    """Fronts and replicas under the traffic of a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.traffic, self.tally = setting, Traffic(setting), Tally()
        costs = setting.calibration.costs()
        self.engines = [Engine(setting.calibration, costs) for _ in range(setting.replicas)]
        self._under_way = [0] * setting.replicas
        rng = random.Random(setting.seed + 1)
        self.routers = [make_router(setting, self._under_way, rng) for _ in range(setting.fronts)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def run(self, on_second: Callable[[], None] = lambda: None) -> Tally:
        """Until every request is answered; ``on_second`` is called for each second of traffic."""
        self._expect_next()
        seconds = 0
        while self._events:
            now, _, event, arguments = heapq.heappop(self._events)
            event(now, *arguments)
            while seconds < min(now, self.traffic.end) - 1:
                seconds += 1
                on_second()
        return self.tally

    def _at(self, when: float, event: Callable[..., None], *arguments: Any) -> None:
        self._number += 1  # so that events of one moment keep their order
        heapq.heappush(self._events, (when, self._number, event, arguments))

    def _is_measured(self, when: float) -> bool:
        return WARM_UP_S <= when < self.traffic.end

    def _expect_next(self) -> None:
        request = self.traffic.next()
        if request is not None:
            self._at(request.at, self._arrive, request)

    def _arrive(self, now: float, request: Request) -> None:
        self._expect_next()
        router = self.routers[request.front]
        request.replica = router.choose(request.work, now)
        router.on_send(request, now)
        self._under_way[request.replica] += 1
        self._at(now + self.setting.delay_s, self._receive, request)

    def _receive(self, now: float, request: Request) -> None:
        engine, router = self.engines[request.replica], self.routers[request.front]
        engine.add(request, now)
        self._at(now + self.setting.delay_s, self._accept, router, request, engine.under_way)
        if not engine.running:
            self._start(now, engine)

    def _accept(self, now: float, router: Router, request: Request, number: int) -> None:
        router.on_accept(request, number, now)

    def _start(self, now: float, engine: Engine) -> None:
        composites, seconds = engine.start(now)
        self._at(now + seconds, self._finish, engine)
        if self._is_measured(now):
            self.tally.busy_s += seconds
            self.tally.composites += len(composites)
            for rung, group in composites:
                self.tally.rungs[str(rung)] += len(group)

    def _finish(self, now: float, engine: Engine) -> None:
        for request in engine.running:
            self._under_way[request.replica] -= 1
            self._at(now + self.setting.delay_s, self._answer, request)
        engine.running = []
        if engine.waiting:
            self._start(now, engine)

    def _answer(self, now: float, request: Request) -> None:
        self.routers[request.front].on_answer(request, now)
        self.tally.answered += self._is_measured(now)
        if self._is_measured(request.at):
            self.tally.latencies_s.append(now - request.at)


def measure(setting: Setting, on_second: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One row of the report; the width is requests over sequences of the upper layers."""
    began = time.process_time()
    tally = Simulation(setting).run(on_second)
    latencies = sorted(tally.latencies_s)
    ran = tally.rungs.total()
    return {
        "replicas": setting.replicas,
        "router": setting.router,
        "fronts": setting.fronts,
        "simulated_s": setting.seconds,
        "requests": len(latencies),
        "offered_per_s": len(latencies) / setting.seconds,
        "throughput_per_s": tally.answered / setting.seconds,
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_ms": 1e3 * latencies[int(0.99 * len(latencies))],
        "width": ran / tally.composites,
        "busy": tally.busy_s / (setting.replicas * setting.seconds),
        "rungs": {rung: number / ran for rung, number in sorted(tally.rungs.items())},
        "cpu_s": time.process_time() - began,
    }
