"""vLLM's scheduler under a plan: its queues, its statistics and its output. Planning is elsewhere.

The requests that ``StepPlanner`` chooses are shown to vLLM's own scheduler as all that waits, and
what it took is the step. A prompt longer than a step runs in chunks as vLLM cuts them; until its
last one is under way nobody else is chosen, so those steps are plain vLLM's.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import (
    RequestQueue,
    SchedulingPolicy,
    create_request_queue,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from revmux_vllm.backbones.loading import attention_windows
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.metrics import put_counts
from revmux_vllm.engine.model_config import served_options
from revmux_vllm.engine.orphans import end_with_parent
from revmux_vllm.engine.sharing import SharedBlocks
from revmux_vllm.engine.stages import LOWER, UPPER, StepTimes
from revmux_vllm.planning.costs import Budgets, Pairs
from revmux_vllm.planning.packing import MuxPlan
from revmux_vllm.planning.planner import Step, StepPlanner, Waiting
from revmux_vllm.planning.policy import ASSUMED_STEPS

logger = init_logger("vllm.revmux")

EXACT = "exact"
"""A ``cache_salt`` of this, or beginning with it and a colon, asks for the backbone alone."""
RECORD = "revmux_record"
"""Attribute of vLLM's request: the planner's own, made once, for it is asked for at every step."""
UNTIMED_STEPS = 5
"""So many steps without times are warned of, once."""


@dataclass
class RevMuxSchedulerOutput(SchedulerOutput):
    """vLLM's step with the plan beside it; pickled to the workers as it is.

    Attributes:
        mux_plan: who shares a composite.
        began_s: when it was begun, on the scheduler's monotonic clock; steps may overlap.
        has_chunks: a part of a request runs, with a context that no cost accounts for.
        pairs: of rows that attend to one another.
    """

    mux_plan: MuxPlan | None = None
    began_s: float = 0.0
    has_chunks: bool = False
    pairs: Pairs = Pairs()  # noqa: RUF009  a tuple


class RevMuxScheduler(Scheduler):
    """``Scheduler`` whose steps carry a ``MuxPlan``."""

    waiting: RequestQueue

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()
        model = self.vllm_config.model_config
        config = RevMuxConfig.from_dict(model.hf_config.revmux)
        options = served_options(self.vllm_config)
        if options.contract is not None:
            logger.info("RevMUX: %s", options.contract.in_words())
        elif options.policy == "load":
            logger.info("RevMUX: rungs in use: %s", options.choice)
        self.planner = StepPlanner(
            config,
            options,
            model.hf_config.num_hidden_layers,
            Budgets(self.max_num_scheduled_tokens, self.max_num_active_reqs),
            time.monotonic(),
            windows=attention_windows(model.hf_config),
        )
        self._ended_s = 0.0
        self._untimed_steps = 0
        self._shared: SharedBlocks | None = None
        if self.cache_config.enable_prefix_caching:
            shared = SharedBlocks(self.kv_cache_manager, self.block_size, self.requests)
            self._shared = self.planner.prefixes = shared

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step of vLLM's scheduler, planned."""
        began = time.monotonic()
        chosen = self._choose(began)
        in_parts = {request.request_id for request in self.running}
        with (
            self._named(chosen) as step,
            self._only([self.requests[member.id] for member in step.members]),
        ):
            planned = time.monotonic()
            output = super().schedule(*args, **kwargs)
            vllms = time.monotonic() - planned
        taken = [self.requests[request_id] for request_id in output.num_scheduled_tokens]
        chunks = {
            request.request_id: not _has_tokens_left(request)
            for request in taken
            if request.request_id in in_parts or _has_tokens_left(request)
        }
        plan = self.planner.plan(step, list(map(_record, taken)), chunks)
        if self._shared is not None:
            self._shared.settle(step, plan, output)
            self._count_cached(output, plan)
        self._count_us("plan", time.monotonic() - began - vllms)
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        return RevMuxSchedulerOutput(
            **values,
            mux_plan=plan,
            began_s=began,
            has_chunks=bool(chunks),
            pairs=self._pairs(plan, output),
        )

    def _pairs(self, plan: MuxPlan, output: SchedulerOutput) -> Pairs:
        """Of a step, in which vLLM has counted what runs as computed."""
        rows = {
            request_id: (tokens, 2 * self.requests[request_id].num_computed_tokens - tokens)
            for request_id, tokens in output.num_scheduled_tokens.items()
        }  # Where some are in the cache attention is causal: see ``reaches``.
        groups = ([rows[member] for member in group] for group in plan.groups)
        return self.planner.costs.pairs(zip(plan.rungs, groups, strict=True))

    def _choose(self, now: float) -> Step:
        if self.pause_state != PauseState.UNPAUSED or any(map(_has_tokens_left, self.running)):
            return Step()
        window = list(map(_record, islice(self.waiting, self.planner.window)))
        free = self.max_num_active_reqs - len(self.running)
        return self.planner.choose(window, len(self.waiting), free, now)

    def _named(self, step: Step) -> AbstractContextManager[Step]:
        if self._shared is None:
            return nullcontext(step)
        return self._shared.named(step)

    @contextmanager
    def _only(self, requests: Sequence[Request]) -> Iterator[None]:
        """Show vLLM ``requests`` as all that waits, in this order, since one may begin behind what
        another one leaves; what it does not take returns to the front."""
        held = self.waiting
        self.waiting = create_request_queue(SchedulingPolicy.FCFS)
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

    def add_request(self, request: Request) -> None:
        """vLLM's, counted for the rate of arrivals."""
        super().add_request(request)
        setattr(request, RECORD, _make_record(request))
        self.planner.arrive(request.num_tokens, request.request_id)

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's, after the costs were learned from the step's times."""
        now = time.monotonic()
        # A step that overlapped the one before it has the device once that one has ended.
        seconds = now - max(scheduler_output.began_s, self._ended_s)
        self._ended_s = now
        if times := getattr(model_runner_output, "revmux_times", None):
            self._learn(times, seconds, scheduler_output)
        elif scheduler_output.total_num_scheduled_tokens and not self.planner.costs.known:
            self._miss_times()
        answered = super().update_from_output(
            scheduler_output, model_runner_output, *args, **kwargs
        )
        if not self.waiting and not self.running:
            self.planner.rest(time.monotonic())
        return answered

    def _learn(
        self, times: Sequence[StepTimes], seconds: float, output: RevMuxSchedulerOutput
    ) -> None:
        """What passes cost, the last of which was the step's, and how long the step took."""
        costs, last = self.planner.costs, times[-1]
        # A chunk attends to all before it, which may be so much that it says little of whole texts.
        for one in times[:-1] if output.has_chunks else times:
            # Passes of the start-up have no sequences, and leave attention out.
            pairs = output.pairs if one is last else Pairs()
            costs.observe_pass(
                one.tokens, one.rows, one.seconds[LOWER], one.seconds.get(UPPER, 0.0), pairs
            )
        costs.observe_overhead(seconds - last.seconds[LOWER] - last.seconds.get(UPPER, 0.0))
        if self.planner.left(last.left, last.shadows, last.trusts):
            logger.warning(
                "RevMUX: requests leave elsewhere than the rows that the accuracy contract was "
                "calibrated on (drift %.1f, from 1 on), so the promise may not hold for them. "
                "Calibrate on texts of today: revmux calibrate; see revmux:contract_agreement.",
                self.planner.drift.degree if self.planner.drift else 0,
            )
        for stage, stage_s in {**last.seconds, "step": seconds}.items():
            self._count_us(stage, stage_s)
        alone_s = seconds
        if not output.has_chunks:
            alone_pairs = output.pairs.lower + output.pairs.alone
            alone_s = costs.seconds(last.tokens, last.tokens, pairs=alone_pairs)
        self._count_us("backbone", alone_s)

    def _miss_times(self) -> None:
        """A step came back without its times: said once, since the policy then goes by a guess."""
        self._untimed_steps += 1
        if self._untimed_steps == UNTIMED_STEPS:
            logger.warning(
                "RevMUX: %d steps came back without the times of their stages (revmux_times, which "
                "the worker sets on vLLM's output), so what a step costs is not known. Policy "
                "`load` goes by a default, %d full steps of the backbone alone per target_ms, "
                "until times come.",
                UNTIMED_STEPS,
                ASSUMED_STEPS,
            )

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, with the planner's since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            put_counts(stats, {**self.planner.counts, **self._now()})
            self.planner.counts.clear()
        return stats

    def _now(self) -> dict[tuple[str, str], int]:
        """What waits, further chunks too, and what could be answered per second: tokens."""
        waiting = self.planner.uncached * sum(request.num_tokens for request in self.waiting)
        waiting += sum(r.num_tokens - r.num_computed_tokens for r in self.running)
        now = {"waiting": waiting, **self.planner.capacity()}
        if self.planner.drift is not None:
            now["drift"] = 100 * self.planner.drift.degree
        return {("now", key): round(tokens) for key, tokens in now.items()}

    def _count_cached(self, output: SchedulerOutput, plan: MuxPlan) -> None:
        rungs = {
            member: rung
            for rung, group in zip(plan.rungs, plan.groups, strict=True)
            for member in group
        }
        for request in output.scheduled_new_reqs:
            if request.num_computed_tokens:
                rung = str(rungs[request.req_id])
                self.planner.counts["cached_tokens", rung] += request.num_computed_tokens

    def _count_us(self, stage: str, seconds: float) -> None:
        self.planner.counts["us", stage] += round(1e6 * seconds)


def _record(request: Request) -> Waiting:
    made: Waiting = getattr(request, RECORD)
    return made


def _make_record(request: Request) -> Waiting:
    """The planner's record of vLLM's request, whose time of arrival is on the wall clock."""
    salt = request.cache_salt
    arrived_s = request.arrival_time - time.time() + time.monotonic()
    return Waiting(request.request_id, request.num_tokens, salt, _is_exact(salt), arrived_s)


def _has_tokens_left(request: Request) -> bool:
    """A chunk of it is yet to be scheduled."""
    return request.num_computed_tokens < request.num_tokens


def _is_exact(salt: str | None) -> bool:
    return salt is not None and (salt == EXACT or salt.startswith(f"{EXACT}:"))
