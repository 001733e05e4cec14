"""vLLM's real scheduler with our plan, whatever happens in whatever order; the model is faked."""

import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import make_tiny_checkpoint
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lone_scheduler import lone_scheduler
from stepping import (
    LONGER,
    LONGER_BLOCKS,
    LONGEST,
    MAX_REQUESTS,
    MAX_TOKENS,
    NUM_BLOCKS,
    computed_tokens,
    drain,
    request,
    run_model,
    step,
    vllm_config,
)
from vllm.config import VllmConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from revmux_vllm.engine.metrics import summary, take_counts
from revmux_vllm.rungs import Rung


class Traffic(RuleBasedStateMachine):
    """Requests arrive, are aborted, preempted and answered; the engine steps, sleeps and wakes.

    Two steps may be in flight, as under asynchronous scheduling.
    """

    folder: Path
    configs: ClassVar[dict[Any, VllmConfig]] = {}

    @initialize(
        options=st.sampled_from(
            [
                {"policy": "fixed:4"},
                {"policy": "fixed:merge:2"},
                {"target_ms": 0.5},
                {"target_ms": 5, "isolate": True},
                {"policy": "off"},
            ]
        ),
        num_blocks=st.sampled_from([6, 10, LONGER_BLOCKS, 100]),
        priority=st.booleans(),
        most_in_flight=st.sampled_from([1, 2]),
    )
    def start(
        self, options: dict[str, Any], num_blocks: int, priority: bool, most_in_flight: int
    ) -> None:
        self.isolate = options.get("isolate", False)
        key = priority, *options.items()
        if key not in self.configs:  # making one takes longer than an example
            self.configs[key] = vllm_config(self.folder, priority, **options)
        self.scheduler = lone_scheduler(self.configs[key], num_blocks)
        self.num_blocks, self.most_in_flight = num_blocks, most_in_flight
        self.flying: deque[Any] = deque()
        self.known: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.answered: Counter[str] = Counter()
        self.by_rung: Counter[str] = Counter()

    @rule(
        lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=12),
        salt=st.sampled_from([None, None, "a", "b", "exact", "exact:a"]),
        priority=st.integers(0, 2),
        is_longer=st.booleans(),
    )
    def arrive(self, lengths: list[int], salt: str | None, priority: int, is_longer: bool) -> None:
        if is_longer and self.num_blocks >= LONGER_BLOCKS:
            lengths = [*lengths, LONGER]
        for length in lengths:
            name = str(len(self.known))
            self.known[name] = request(name, length, salt, priority)
            self.scheduler.add_request(self.known[name])

    @precondition(lambda self: len(self.flying) < self.most_in_flight)
    @rule()
    def schedule(self) -> None:
        output: Any = self.scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        may_wait = self.flying or not self.scheduler.has_unfinished_requests()
        assert scheduled or may_wait, "idle, requests wait"
        self.flying.append(output)
        assert sum(scheduled.values()) <= MAX_TOKENS
        assert len(scheduled) <= MAX_REQUESTS
        members = [name for group in output.mux_plan.groups for name in group]
        assert sorted(members) == sorted(scheduled), "every member once, nobody else"
        for rung, group in zip(output.mux_plan.rungs, output.mux_plan.groups, strict=True):
            requests = [self.known[name] for name in group]
            before = computed_tokens(output)
            if any(before[r.request_id] + scheduled[r.request_id] < r.num_tokens for r in requests):
                assert output.has_chunks
                assert output.mux_plan.all_alone
                assert len(scheduled) == 1, "nobody beside a chunk"
            assert requests[0].num_tokens == max(r.num_tokens for r in requests)
            salts = {r.cache_salt for r in requests}
            assert len(salts) == 1, "isolation"
            if salts & {"exact", "exact:a"}:
                assert rung == Rung()
            if self.isolate and salts == {None}:
                assert rung.mux == 1

    @precondition(lambda self: self.flying)
    @rule()
    def update(self) -> None:
        output = self.flying.popleft()
        outputs = self.scheduler.update_from_output(output, run_model(output, self.known))
        for batch in outputs.values():
            for answer in batch.outputs:
                assert answer.pooling_output.item() == float(answer.request_id), "its own answer"
                self.answered[answer.request_id] += 1
            if batch.scheduler_stats:
                for (kind, rung), n in take_counts(batch.scheduler_stats).items():
                    self.by_rung[rung] += n if kind == "requests" else 0

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        if self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED):
            self.aborted.add(name)

    @rule()
    def sleep_and_wake(self) -> None:
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        if not self.flying:
            assert not self.scheduler.schedule().num_scheduled_tokens
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    @precondition(lambda self: self.flying)
    @rule()
    def preempt(self) -> None:
        """As for lack of pages: what runs returns to the queue, and its output is void."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    @invariant()
    def answers_are_nobody_elses(self) -> None:
        if hasattr(self, "answered"):
            assert all(n == 1 for n in self.answered.values())
            assert not self.aborted & set(self.answered)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.flying or self.scheduler.has_unfinished_requests():
            if len(self.flying) < self.most_in_flight and self.scheduler.has_unfinished_requests():
                self.schedule()
            else:
                self.update()
        assert set(self.answered) == set(self.known) - self.aborted, "none is lost"
        assert not self.scheduler.requests
        assert not self.scheduler.waiting
        assert self.scheduler.kv_cache_manager.usage == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scheduler")
    return make_tiny_checkpoint(root, rungs="mux:2,mux:4,merge:2")


def test_none_is_lost_or_mixed_up_whatever_happens(folder: Path) -> None:
    machine = type("Traffic", (Traffic,), {"folder": folder})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None)
    )


def test_width_follows_the_load(folder: Path) -> None:
    scheduler = lone_scheduler(
        vllm_config(folder, rungs=["mux:2", "mux:4"], target_ms=100), NUM_BLOCKS
    )
    scheduler.add_request(request("0", 8))
    assert [str(rung) for rung in step(scheduler)[0].rungs] == ["alone"]
    scheduler.add_request(request("1", 8))
    scheduler.add_request(request("2", 8))
    assert [str(rung) for rung in step(scheduler)[0].rungs] == ["alone", "alone"]
    for i in range(3, 303):  # 1 s of work alone
        scheduler.add_request(request(str(i), 8))
    plans = drain(scheduler)
    assert [str(rung) for rung in plans[0].rungs] == ["mux:4"] * 3
    now = scheduler._now()
    assert now["now", "waiting"] == 0
    assert now["now", "in_use"] <= now["now", "widest"]
    assert sum(rung.mux for plan in plans for rung in plan.rungs if rung == Rung(mux=4)) > 250


def test_a_paused_engine_takes_nothing_and_loses_nothing(folder: Path) -> None:
    scheduler = lone_scheduler(vllm_config(folder, policy="fixed:4"), NUM_BLOCKS)
    for i in range(6):
        scheduler.add_request(request(str(i), 8))
    for state in (PauseState.PAUSED_NEW, PauseState.PAUSED_ALL):
        scheduler.set_pause_state(state)
        for _ in range(3):
            plan, answers = step(scheduler)
            assert not plan.groups
            assert not answers
        assert [waiting.request_id for waiting in scheduler.waiting] == list("012345")
    scheduler.set_pause_state(PauseState.UNPAUSED)
    plan, answers = step(scheduler)
    assert [len(group) for group in plan.groups] == [4, 2]
    assert answers == {str(i): float(i) for i in range(6)}


def test_priority_comes_first(folder: Path) -> None:
    scheduler = lone_scheduler(vllm_config(folder, priority=True, policy="fixed:4"), NUM_BLOCKS)
    for i in range(40):
        scheduler.add_request(request(str(i), 60, priority=i % 4))
    order = [int(group[0]) % 4 for plan in drain(scheduler) for group in plan.groups]
    assert order == sorted(order)


def test_it_lingers_for_partners_only_when_asked_to(folder: Path) -> None:
    scheduler = lone_scheduler(vllm_config(folder, policy="fixed:4", linger_ms=60), NUM_BLOCKS)
    began = time.monotonic()
    scheduler.add_request(request("0", 8))
    plan, _ = step(scheduler)
    assert not plan.groups
    for i in range(1, 4):
        scheduler.add_request(request(str(i), 8))
    assert [len(group) for group in step(scheduler)[0].groups] == [4], "full, so it runs"
    scheduler.add_request(request("4", 8, salt="exact"))
    assert step(scheduler)[0].groups == (("4",),), "who wants no partner waits for none"
    began = time.monotonic()
    scheduler.add_request(request("5", 8))
    while not step(scheduler)[0].groups:
        assert time.monotonic() - began < 5
    assert time.monotonic() - began > 0.05


def test_what_is_counted(folder: Path) -> None:
    scheduler = lone_scheduler(vllm_config(folder, policy="fixed:4"), NUM_BLOCKS)
    for i, (length, salt) in enumerate(
        [(9, None)] * 3 + [(7, None), (5, "exact"), (5, "a"), (5, "b")]
    ):
        scheduler.add_request(request(str(i), length, salt))
    output: Any = scheduler.schedule()
    batches = scheduler.update_from_output(output, run_model(output, scheduler.requests))
    counts = take_counts(next(iter(batches.values())).scheduler_stats)
    times = {label: n for (kind, label), n in counts.items() if kind == "us"}
    assert set(times) == {"plan", "lower", "upper", "step", "backbone"}
    assert times["plan"] <= times["step"]
    assert times["lower"] == round(1e6 * 1e-4 * 49)
    now = {label: n for (kind, label), n in counts.items() if kind == "now"}
    assert now["waiting"] == 0
    assert 0 < now["in_use"] == now["widest"], "a fixed policy"
    assert {key: n for key, n in counts.items() if key[0] not in ("us", "now")} == {
        ("arrived_tokens", ""): 49,
        ("requests", "mux:4"): 4,
        ("requests", "alone"): 3,
        ("composites", "mux:4"): 1,
        ("composites", "alone"): 3,
        ("composite_slots", ""): 36,
        ("composite_tokens", ""): 34,
        ("fallbacks", "exact"): 1,
        ("fallbacks", "isolation"): 2,
    }
    line = summary(counts)
    assert line.startswith("7 requests, alone 43%, mux:4 57%, padding 5.9%, ")
    assert summary(Counter()) == ""


def test_attention_s_part_of_a_step_is_learned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = lone_scheduler(vllm_config(folder, policy="fixed:4"), NUM_BLOCKS)
    for i, (length, salt) in enumerate([(9, None)] * 3 + [(7, None), (5, "exact")]):
        scheduler.add_request(request(str(i), length, salt))
    output: Any = scheduler.schedule()
    costs, alone = scheduler.planner.costs, 3 * 9**2 + 7**2 + 5**2
    composites = 9**2 + 5**2
    expected = costs.lower * alone, costs.upper * composites, costs.upper * alone
    assert output.pairs == expected
    learned: list[Any] = []
    monkeypatch.setattr(costs, "observe_pass", lambda *seen: learned.append(seen[-1]))
    answer: Any = run_model(output, scheduler.requests)
    answer.revmux_times = [answer.revmux_times[0], replace(answer.revmux_times[0])]
    scheduler.update_from_output(output, answer)
    assert learned == [(0, 0, 0), expected], "the first is of the start-up"


def test_steps_without_times_are_said_once_and_still_multiplex(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the worker's times do not arrive; times that come later count."""
    scheduler = lone_scheduler(vllm_config(folder, rungs=["mux:2", "mux:4"]), NUM_BLOCKS)
    for i in range(600):
        scheduler.add_request(request(str(i), 8))
    steps, rungs = 0, set()
    while scheduler.has_unfinished_requests():
        output: Any = scheduler.schedule()
        rungs |= set(map(str, output.mux_plan.rungs))
        answer = run_model(output, scheduler.requests, is_timed=False)
        scheduler.update_from_output(output, answer)
        steps += 1
    assert steps == 600 / MAX_REQUESTS
    assert "mux:4" in rungs
    warnings = [each for each in caplog.records if "without the times" in each.getMessage()]
    assert len(warnings) == 1
    assert not scheduler.planner.costs.known
    scheduler.add_request(request("600", 8))
    step(scheduler)
    assert scheduler.planner.costs.known


def test_steps_that_overlap_keep_their_own_clocks(folder: Path) -> None:
    scheduler = lone_scheduler(vllm_config(folder, policy="fixed:4"), NUM_BLOCKS)
    began, flying, steps_s = time.monotonic(), deque[Any](), []
    for i in range(3):
        scheduler.add_request(request(str(i), 8))
        flying.append(scheduler.schedule())
        if len(flying) == 2:
            time.sleep(0.02)
            output = flying.popleft()
            outputs = scheduler.update_from_output(output, run_model(output, scheduler.requests))
            counts = take_counts(next(iter(outputs.values())).scheduler_stats)
            steps_s.append(counts["us", "step"] / 1e6)
    elapsed = time.monotonic() - began
    assert len(steps_s) == 2
    assert all(seconds >= 0.02 for seconds in steps_s)
    assert sum(steps_s) <= elapsed, "no time is counted twice"


def test_memory_for_few_requests_only_slows(folder: Path) -> None:
    scheduler = lone_scheduler(vllm_config(folder, policy="fixed:4"), num_blocks=6)
    for i in range(20):
        scheduler.add_request(request(str(i), 40))
    plans = drain(scheduler)
    assert all(len(group) == 1 for plan in plans for group in plan.groups), "a composite's members"
    assert sum(len(plan.groups) for plan in plans) == 20
