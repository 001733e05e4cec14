"""vLLM's scheduler, and before it the plan: who runs now, and who shares a composite.

Of the requests that wait, a window is packed into composites, those with the oldest members are
shown to vLLM's own scheduler as all that waits, and what it took is the step. Nothing is remembered
from one step to the next but the rung and the costs: a request that was aborted, preempted or not
taken is simply not there, or there again, when the next step is planned.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.costs import ArrivalRate, Backlog, LayerCosts
from revmux_vllm.engine.metrics import Counts, put_counts
from revmux_vllm.engine.orphans import end_with_parent
from revmux_vllm.engine.policy import make_policy, read_options
from revmux_vllm.engine.stages import LOWER, UPPER
from revmux_vllm.packing import MuxPlan, Packed, fallbacks, first_of, pack_rungs
from revmux_vllm.rungs import Rung

EXACT = "exact"
"""A ``cache_salt`` of this, or beginning with it and a colon, asks for the backbone alone."""

RATE_HORIZONS = 5
"""The rate of arrivals is an average over so many horizons, so that a burst is no rate."""


@dataclass
class RevMuxSchedulerOutput(SchedulerOutput):
    """vLLM's step with the plan beside it; pickled to the workers as it is."""

    mux_plan: MuxPlan | None = None


class RevMuxScheduler(Scheduler):
    """``Scheduler`` whose steps carry a ``MuxPlan``."""

    waiting: RequestQueue

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()
        model = self.vllm_config.model_config
        self.revmux = RevMuxConfig.from_dict(model.hf_config.revmux)
        self.options = read_options(self.vllm_config.additional_config, self.revmux)
        self.costs = LayerCosts(self.revmux.prefill_layers, model.hf_config.num_hidden_layers)
        self.arrivals = ArrivalRate(RATE_HORIZONS * self.options.target_ms / 1000, time.monotonic())
        budgets = self.max_num_scheduled_tokens, self.max_num_running_reqs
        self.mux_policy = make_policy(self.revmux, self.options, self.costs, *budgets)
        self.counts: Counts = Counter()
        self._step_began = 0.0
        self._choice_at = time.time()
        self._lingering_since: float | None = None

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step of vLLM's scheduler, planned."""
        self._step_began = began = time.monotonic()
        window = list(islice(self.waiting, self.mux_policy.window))
        rungs = self.mux_policy.rungs(self._backlog(window, began))
        chosen = self._choose(window, rungs, began)
        with self._only([request for _, group in chosen for request in group]):
            planned = time.monotonic()
            output = super().schedule(*args, **kwargs)
            vllms = time.monotonic() - planned
        running = [self.requests[request_id] for request_id in output.num_scheduled_tokens]
        plan = self._plan(chosen, running, rungs)
        self.counts["us", "plan"] += _us(time.monotonic() - began - vllms)
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        return RevMuxSchedulerOutput(**values, mux_plan=plan)

    def _backlog(self, window: list[Request], now: float) -> Backlog:
        """All that waits, its lengths judged by the window's."""
        rate = self.arrivals.update(now)
        num_requests = len(self.waiting)
        tokens = sum(request.num_tokens for request in window) / max(1, len(window))
        return Backlog(num_requests, num_requests * tokens, rate)

    def _choose(
        self, window: list[Request], rungs: tuple[Rung, ...], now: float
    ) -> list[tuple[Rung, tuple[Request, ...]]]:
        """Composites that should run now; none while the engine lingers or is paused."""
        if self.pause_state != PauseState.UNPAUSED:
            return []
        if self._lingers(window, rungs):
            self._lingering_since = self._lingering_since or now
            return []
        if self._lingering_since is not None and window:
            self.counts["us", "linger"] += _us(now - self._lingering_since)
        self._lingering_since = None
        composites = first_of(
            self._pack(window, rungs),
            [request.num_tokens for request in window],
            rungs,
            self.max_num_scheduled_tokens,
            self.max_num_running_reqs - len(self.running),
            self._fresh(window),
        )
        return [(rung, tuple(window[i] for i in group)) for rung, group in composites]

    def _lingers(self, window: list[Request], rungs: tuple[Rung, ...]) -> bool:
        """Whether to wait for partners, which only ``linger_ms`` allows."""
        if not 0 < len(window) < max((rung.mux for rung in rungs), default=1):
            return False
        waited_ms = 1000 * (time.time() - min(request.arrival_time for request in window))
        return waited_ms < self.options.linger_ms and not any(map(_is_exact, window))

    def _fresh(self, window: list[Request]) -> set[int]:
        """Those that came while the last step ran, and could share a composite."""
        if not self.mux_policy.defers:
            return set()
        began, self._choice_at = self._choice_at, time.time()
        return {
            i
            for i, request in enumerate(window)
            if request.arrival_time > began and not _is_exact(request)
        }

    def _pack(self, requests: list[Request], rungs: tuple[Rung, ...]) -> list[Packed]:
        return pack_rungs(
            [request.num_tokens for request in requests],
            rungs,
            # Members influence one another's answer, so tenants are kept apart.
            [self._domain(request) for request in requests],
            {i for i, request in enumerate(requests) if _is_exact(request)},
        )

    def _domain(self, request: Request) -> str | None:
        if request.cache_salt is None and self.options.isolate:
            return request.request_id
        return request.cache_salt

    @contextmanager
    def _only(self, requests: list[Request]) -> Iterator[None]:
        """Show vLLM ``requests`` as all that waits; what it leaves returns to the front."""
        held = self.waiting
        self.waiting = create_request_queue(self.policy)
        try:
            if requests:
                held.remove_requests(requests)
            for request in requests:
                self.waiting.add_request(request)
            yield
        finally:
            left = list(self.waiting)
            self.waiting = held
            # Since a queue's own ``prepend_requests`` turns their order round.
            self.waiting.prepend_requests(reversed(left))

    def _plan(
        self,
        chosen: list[tuple[Rung, tuple[Request, ...]]],
        running: list[Request],
        rungs: tuple[Rung, ...],
    ) -> MuxPlan:
        """The composites of which vLLM took every member; the members of others anew."""
        taken = set(running)
        whole = [(rung, group) for rung, group in chosen if taken.issuperset(group)]
        taken = taken.difference(*(group for _, group in whole))
        rest = [request for request in running if request in taken]
        whole += [(rung, tuple(rest[i] for i in group)) for rung, group in self._pack(rest, rungs)]
        self._count(whole, rungs)
        groups = tuple(tuple(request.request_id for request in group) for _, group in whole)
        return MuxPlan(groups, tuple(rung for rung, _ in whole))

    def _count(
        self, composites: list[tuple[Rung, tuple[Request, ...]]], rungs: tuple[Rung, ...]
    ) -> None:
        for rung, group in composites:
            self.counts["requests", str(rung)] += len(group)
            self.counts["composites", str(rung)] += 1
            if rung.mux > 1:
                self.counts["composite_slots", ""] += len(group) * group[0].num_tokens
                self.counts["composite_tokens", ""] += sum(r.num_tokens for r in group)
        alone = [group[0] for rung, group in composites if rung == Rung()]
        reasons = fallbacks(
            [(self._domain(request), _is_exact(request)) for request in alone],
            self.mux_policy.alone_because if not rungs else None,
        )
        for reason, n in reasons.items():
            self.counts["fallbacks", reason] += n

    def add_request(self, request: Request) -> None:
        """vLLM's, counted for the rate of arrivals."""
        self.arrivals.add(request.num_tokens)
        self.counts["arrived_tokens", ""] += request.num_tokens
        super().add_request(request)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's, after the costs were learned from the step's times."""
        times = getattr(model_runner_output, "revmux_times", [])
        for step in times:
            self.costs.observe(self.costs.lower, step.tokens, step.seconds[LOWER])
            self.costs.observe(self.costs.upper, step.rows, step.seconds.get(UPPER, 0.0))
        if times:
            seconds = time.monotonic() - self._step_began
            last = times[-1].seconds
            self.costs.observe_overhead(seconds - last[LOWER] - last.get(UPPER, 0.0))
            for stage, stage_s in {**last, "step": seconds}.items():
                self.counts["us", stage] += _us(stage_s)
            tokens = times[-1].tokens
            self.counts["us", "backbone"] += _us(self.costs.seconds(tokens, tokens))
        return super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, with ours since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            put_counts(stats, {**self.counts, **self._now()})
            self.counts.clear()
        return stats

    def _now(self) -> dict[tuple[str, str], int]:
        """What waits, and what could be answered per second: tokens."""
        now = {"waiting": float(sum(request.num_tokens for request in self.waiting))}
        for at, saving in zip(("in_use", "widest"), self.mux_policy.savings, strict=True):
            now[at] = self.costs.tokens_per_s(saving, self.max_num_scheduled_tokens)
        return {("now", key): round(tokens) for key, tokens in now.items()}


def _is_exact(request: Request) -> bool:
    salt = request.cache_salt
    return salt is not None and (salt == EXACT or salt.startswith(f"{EXACT}:"))


def _us(seconds: float) -> int:
    return round(1e6 * seconds)
