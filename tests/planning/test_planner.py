"""Steps planned one after the other, whatever arrives, is aborted, or is taken in part."""

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.costs import Budgets, LayerCosts
from revmux_vllm.planning.options import read_options
from revmux_vllm.planning.planner import Composite, Step, StepPlanner, Waiting
from revmux_vllm.rungs import Rung, parse_rungs

RUNGS = parse_rungs(["mux:2", "mux:4", "merge:2", "merge:2+mux:2"])
CONFIG = RevMuxConfig(RUNGS, prefill_layers=1)
NUM_LAYERS, LONGEST, WIDEST = 4, 60, 4
STEP_S = 0.01
AMPLE = Budgets(max_tokens=2048, max_requests=128)

lengths_strategy = st.integers(1, LONGEST)
domains_strategy = st.sampled_from([None, None, None, "a", "b"])


def planner(budgets: Budgets = AMPLE, **options: Any) -> StepPlanner:
    """A planner that has measured: a millisecond a token, and next to nothing a step."""
    costs = LayerCosts(CONFIG.prefill_layers, NUM_LAYERS)
    for tokens in (16, 64, 256):
        costs.observe(NUM_LAYERS, tokens, tokens / 1000)
    read = read_options({"revmux": options}, CONFIG)
    return StepPlanner(CONFIG, read, NUM_LAYERS, budgets, now_s=0.0, costs=costs)


def choose(of: StepPlanner, waiting: list[Waiting], now_s: float) -> Step:
    return of.choose(waiting[: of.window], len(waiting), of.budgets.max_requests, now_s)


def names(composites: tuple[Composite, ...]) -> list[tuple[str, ...]]:
    return [tuple(member.id for member in group) for _, group in composites]


class Planning(RuleBasedStateMachine):
    """An engine that takes what it likes of every step: all, a part, and some of its own.

    What is longer than a step it takes in chunks, and chooses nobody else meanwhile.
    """

    @initialize(
        options=st.sampled_from(
            [
                {"policy": "fixed:4"},
                {"policy": "fixed:merge:2"},
                {"policy": "fixed:merge:2+mux:2", "isolate": True},
                {"policy": "fixed:4", "linger_ms": 25},
                {"policy": "off"},
                {"policy": "fixed:contract", "agreement": 0.9},
                {"target_ms": 100, "agreement": 0.9, "rungs": ["mux:4"]},
                {"target_ms": 100},
                {"target_ms": 100, "isolate": True, "rungs": ["mux:2", "mux:4"]},
                {"target_ms": 100, "linger_ms": 25},
            ]
        ),
        max_tokens=st.sampled_from([LONGEST, 150, 400]),
        max_requests=st.sampled_from([1, 3, 12]),
    )
    def start(self, options: dict[str, Any], max_tokens: int, max_requests: int) -> None:
        self.planner = planner(Budgets(max_tokens, max_requests), **options)
        self.long: Waiting | None = None
        self.tokens_left = 0
        self.now, self.made = 0.0, 0
        self.waiting: list[Waiting] = []
        self.passed_over: set[str] = set()
        self.taken, self.counted, self.promised = 0, 0, 0

    def make(self, length: int, domain: str | None, exact: bool) -> Waiting:
        self.made += 1
        return Waiting(str(self.made), length, domain, exact, self.now)

    @rule(
        requests=st.lists(
            st.tuples(
                lengths_strategy | st.just(5 * LONGEST),
                domains_strategy,
                st.sampled_from([False, False, True]),
            ),
            min_size=1,
            max_size=12,
        ),
    )
    def arrive(self, requests: list[tuple[int, str | None, bool]]) -> None:
        for request in requests:
            self.waiting.append(self.make(*request))
            self.planner.arrive(request[0])

    @precondition(lambda self: self.long)
    @rule(is_preempted=st.booleans())
    def lose_the_long_one(self, is_preempted: bool) -> None:
        """Between two of its chunks: it is aborted, or returns to the queue to begin anew."""
        if is_preempted:
            self.waiting.insert(0, self.long)
        self.long, self.tokens_left = None, 0

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.waiting.remove(data.draw(st.sampled_from(self.waiting)))

    @rule()
    def change_the_policy(self) -> None:
        """As an engine does that is asked to run at one rung."""
        self.planner.fix(CONFIG.kind(Rung(mux=2)))

    @rule(
        data=st.data(),
        most_dropped=st.sampled_from([0, 1, 2, 12]),
        resumed=st.lists(lengths_strategy, max_size=2),
    )
    def step(self, data: st.DataObject, most_dropped: int, resumed: list[int]) -> None:
        self.now += STEP_S
        if self.long:
            self.take_chunk()
            return
        step = choose(self.planner, self.waiting, self.now)
        self.check_step(step)
        taken = step.members
        if self.is_long(taken):
            self.begin_long(taken[0])
            return
        if taken and most_dropped:
            some = st.lists(st.sampled_from(taken), unique=True, max_size=most_dropped)
            dropped = data.draw(some)
            taken = [request for request in taken if request not in dropped]
            taken += [self.make(length, None, False) for length in resumed]
            taken = data.draw(st.permutations(taken))
        self.check_plan(step, taken)
        self.waiting = [request for request in self.waiting if request not in taken]

    def check_step(self, step: Step) -> None:
        members, budgets = step.members, self.planner.budgets
        assert len(members) == len(set(members)) <= budgets.max_requests
        assert set(members) <= set(self.waiting)
        if self.is_long(members):
            assert step.composites == ((Rung(), (members[0],)),), "by itself"
        else:
            assert sum(member.num_tokens for member in members) <= budgets.max_tokens
        self.check_composites(step.composites, step.rungs)
        if not self.waiting:
            assert not members
        elif not members:
            self.check_lingering(step)
        elif (first := self.waiting[0]) not in members:
            assert self.planner.policy.defers, "the longest waiting one always runs"
            assert not first.exact
            assert first.id not in self.passed_over, "it is left for the next step once"
            assert max(rung.mux for rung in step.rungs) in {r.mux for r, _ in step.composites}
        if members:
            self.passed_over |= {request.id for request in self.waiting}

    def is_long(self, members: list[Waiting]) -> bool:
        return any(r.num_tokens > self.planner.budgets.max_tokens for r in members)

    def begin_long(self, request: Waiting) -> None:
        self.waiting.remove(request)
        self.long, self.tokens_left = request, request.num_tokens
        self.take_chunk()

    def take_chunk(self) -> None:
        """It is counted once, with its last chunk."""
        assert self.long
        self.tokens_left -= min(self.tokens_left, self.planner.budgets.max_tokens)
        is_last = not self.tokens_left
        plan = self.planner.plan(Step(), [self.long], {self.long.id: is_last})
        assert plan.groups == ((self.long.id,),)
        assert plan.all_alone
        self.taken += is_last
        self.counted += is_last
        self.check_counts()
        if is_last:
            self.long = None

    def check_lingering(self, step: Step) -> None:
        waited_ms = 1000 * (self.now - min(request.arrived_s for request in self.waiting))
        assert waited_ms < self.planner.options.linger_ms, "only when asked, and not for ever"
        assert len(self.waiting) < max(rung.mux for rung in step.rungs), "it would be full"
        assert not any(request.exact for request in self.waiting)
        assert not self.is_long(self.waiting)

    def check_plan(self, step: Step, taken: list[Waiting]) -> None:
        plan = self.planner.plan(step, taken)
        by_id = {request.id: request for request in taken}
        assert sorted(name for group in plan.groups for name in group) == sorted(by_id)
        composites = tuple(
            (rung, tuple(by_id[name] for name in group))
            for rung, group in zip(plan.rungs, plan.groups, strict=True)
        )
        self.check_composites(composites, step.rungs)
        for rung, group in step.composites:
            if set(group) <= set(taken):
                assert (rung, group) in composites, "what is whole stays as it is"
        self.taken += len(taken)
        self.counted += len(composites)
        if under := sum(rung.sure for rung, _ in composites):  # one never was, one was a shadow
            left = {"alone": under - under // 2, "exit@2": under // 2}
            self.planner.left(left, {("exit@3", "same"): 1})
            self.promised += under
        self.check_counts()

    def check_counts(self) -> None:
        counts = self.planner.counts
        assert sum(n for (kind, _), n in counts.items() if kind == "requests") == self.taken
        assert sum(n for (kind, _), n in counts.items() if kind == "composites") == self.counted
        assert sum(n for (kind, _), n in counts.items() if kind == "contract") == self.promised

    def check_composites(self, composites: tuple[Composite, ...], rungs: tuple[Rung, ...]) -> None:
        for rung, group in composites:
            assert rung in {Rung(), *rungs}
            assert rung.mux == len(group)
            assert group[0].num_tokens == max(member.num_tokens for member in group)
            assert len({member.domain for member in group}) == 1, "tenants are kept apart"
            if any(member.exact for member in group):
                assert rung == Rung()
            if self.planner.options.isolate and group[0].domain is None:
                assert rung.mux == 1

    def teardown(self) -> None:
        """All run within as many steps as they have chunks, and two more for who was left once."""
        if not hasattr(self, "waiting"):
            return
        per_step = self.planner.budgets.max_tokens
        left = 2 + self.planner.options.linger_ms / 1000 / STEP_S - -self.tokens_left // per_step
        left += sum(-(-request.num_tokens // per_step) for request in self.waiting)
        while self.waiting or self.long:
            self.now += STEP_S
            left -= 1
            if self.long:
                self.take_chunk()
                continue
            step = choose(self.planner, self.waiting, self.now)
            self.check_step(step)
            assert left >= 0
            if self.is_long(step.members):
                self.begin_long(step.members[0])
                continue
            self.check_plan(step, step.members)
            self.waiting = [request for request in self.waiting if request not in step.members]


def test_none_is_lost_doubled_or_mixed_up_whatever_happens() -> None:
    run_state_machine_as_test(
        Planning, settings=settings(max_examples=50, stateful_step_count=20, deadline=None)
    )


@given(
    lengths=st.lists(
        st.tuples(lengths_strategy | st.just(400), domains_strategy), min_size=1, max_size=80
    ),
    bursts=st.lists(st.integers(0, 12), max_size=30),
    policy=st.sampled_from(["load", "fixed:4"]),
)
@settings(deadline=None, max_examples=60)
def test_the_pth_is_overtaken_by_a_bounded_number(
    lengths: list[tuple[int, str | None]], bursts: list[int], policy: str
) -> None:
    """By (N - 1) p others, and by the step in which it was left for its partners, once."""
    of = planner(Budgets(150, 8), policy=policy, target_ms=100, rungs=["mux:2", "mux:4"])
    waiting: list[Waiting] = []
    places: dict[Waiting, int] = {}
    overtaken: Counter[Waiting] = Counter()
    seen: set[Waiting] = set()
    now_s = 0.0

    def arrive(length: int, domain: str | None) -> None:
        request = Waiting(str(len(places)), length, domain, arrived_s=now_s)
        places[request] = len(waiting)
        waiting.append(request)
        of.arrive(length)

    for length, domain in lengths:
        arrive(length, domain)
    while waiting:
        now_s += STEP_S
        members = set(choose(of, waiting, now_s).members)
        for place, request in enumerate(waiting):
            by = sum(other in members for other in waiting[place + 1 :])
            left_for_partners = of.policy.defers and request not in seen
            if request not in members and not left_for_partners:
                overtaken[request] += by
        seen |= set(waiting)
        waiting = [request for request in waiting if request not in members]
        for i in range(bursts.pop() if bursts else 0):
            arrive(1 + 7 * i % LONGEST, None)
    for request, number in overtaken.items():
        assert number <= (WIDEST - 1) * places[request]


@given(bursts=st.lists(st.lists(lengths_strategy, max_size=9), min_size=1, max_size=20))
@settings(deadline=None)
def test_who_just_came_waits_for_one_step_at_most(bursts: list[list[int]]) -> None:
    of = planner(Budgets(10_000, 1000), target_ms=20)
    waiting: list[Waiting] = []
    number, now_s = 0, 0.0
    for burst in [*bursts, []]:
        now_s += STEP_S
        left = list(waiting)
        for length in burst:
            number += 1
            waiting.append(Waiting(str(number), length, arrived_s=now_s))
            of.arrive(length)
        now_s += STEP_S
        members = set(choose(of, waiting, now_s).members)
        assert members >= set(left), "it waited for a step before"
        waiting = [request for request in waiting if request not in members]
        if waiting:
            assert members, "while another composite runs"
    assert not waiting


def test_who_just_came_is_left_while_a_full_composite_runs() -> None:
    of = planner(min_width=4, rungs=["mux:2", "mux:4"])
    waiting = [Waiting(str(i), 9, arrived_s=0.5) for i in range(5)]
    step = choose(of, waiting, 1.0)
    assert names(step.composites) == [("0", "1", "2", "3")]
    assert names(choose(of, waiting[4:], 2.0).composites) == [("4",)], "it has waited before"
    exact = Waiting("exact", 9, None, True, 2.5)
    waiting = [Waiting(str(i), 9, arrived_s=2.5) for i in range(5)]
    step = choose(of, [*waiting, exact], 3.0)
    assert names(step.composites) == [("0", "1", "2", "3"), ("exact",)], "it needs no partner"
    fixed = planner(policy="fixed:4")
    assert len(choose(fixed, waiting, 3.0).members) == 5, "only `load` lets them wait"


def test_one_longer_than_a_step_runs_by_itself_and_is_counted_once() -> None:
    of = planner(Budgets(max_tokens=50, max_requests=9), policy="fixed:2")
    waiting = [Waiting("long", 120), Waiting("a", 9), Waiting("b", 9)]
    step = choose(of, waiting, 1.0)
    assert step.composites == ((Rung(), (waiting[0],)),)
    for is_last in (False, False, True):
        plan = of.plan(step, waiting[:1], {"long": is_last})
        assert plan.groups == (("long",),)
        assert of.counts["requests", "alone"] == of.counts["fallbacks", "long"] == int(is_last)
    assert names(choose(of, waiting[1:], 2.0).composites) == [("a", "b")]
    assert names(choose(of, waiting[::-1], 2.0).composites) == [("b", "a")], "in its turn"
    of.plan(choose(of, [exact := Waiting("exact", 120, None, True)], 3.0), [exact], {"exact": True})
    assert of.counts["fallbacks", "exact"] == 1


def test_beside_a_chunk_everything_runs_alone() -> None:
    """Whatever cut it: then the step is vLLM's own."""
    of = planner(policy="fixed:2")
    waiting = [Waiting(name, 9) for name in "abcd"]
    step = choose(of, waiting, 1.0)
    assert [rung.mux for rung, _ in step.composites] == [2, 2]
    plan = of.plan(step, waiting, {"b": False, "c": True})
    assert plan.groups == (("a",), ("b",), ("c",), ("d",))
    assert plan.all_alone
    assert of.counts["requests", "alone"] == of.counts["fallbacks", "long"] == 3


def test_members_taken_in_part_are_packed_anew() -> None:
    of = planner(policy="fixed:4")
    waiting = [Waiting(str(i), 20 - i) for i in range(8)]
    step = choose(of, waiting, 1.0)
    assert names(step.composites) == [("0", "1", "2", "3"), ("4", "5", "6", "7")]
    plan = of.plan(step, [waiting[i] for i in (7, 6, 2, 1, 0, 4, 5)])
    assert plan.groups == (("4", "5", "6", "7"), ("0", "1"), ("2",))
    assert plan.rungs == (Rung(mux=4), Rung(mux=2), Rung())
    assert of.plan(step, []).groups == ()


def test_it_lingers_from_the_first_moment_until_partners_or_the_time_are_there() -> None:
    of = planner(policy="fixed:4", linger_ms=50)
    waiting = [Waiting("0", 9, arrived_s=0.0)]
    for now_s in (0.0, 0.01, 0.049):
        assert choose(of, waiting, now_s) == Step(CONFIG.kind(Rung(mux=4)))
    assert not of.counts["us", "linger"]
    waiting.append(Waiting("1", 9, arrived_s=0.05))
    assert names(choose(of, waiting, 0.06).composites) == [("0", "1")], "as long as the first may"
    assert of.counts["us", "linger"] == 60_000
    full = [Waiting(str(i), 9, arrived_s=0.06) for i in range(4)]
    assert names(choose(of, full, 0.061).composites) == [("0", "1", "2", "3")]
    assert names(choose(of, [Waiting("0", 9, None, True, 0.07)], 0.071).composites) == [("0",)]
    assert of.counts["us", "linger"] == 60_000


def test_nobody_shares_with_one_who_is_isolated() -> None:
    """Not even by a domain that is called as the other request is."""
    of = planner(policy="fixed:2", isolate=True)
    waiting = [Waiting("a", 9), Waiting("b", 9), Waiting("c", 9, "a"), Waiting("d", 9, "a")]
    assert sorted(names(choose(of, waiting, 1.0).composites)) == [("a",), ("b",), ("c", "d")]
    of.plan(choose(of, waiting[:3], 2.0), waiting[:3])
    assert of.counts["fallbacks", "isolation"] == 3


def test_an_idle_engine_answers_exactly_whatever_came_a_moment_ago() -> None:
    busy = planner(target_ms=100)
    burst = [Waiting(str(i), 50) for i in range(400)]
    for request in burst:
        busy.arrive(request.num_tokens)
    assert choose(busy, burst, 1.0).rungs
    one = [Waiting("one", 50)]
    busy.arrive(50)
    assert choose(busy, one, 1.2).rungs, "the rate of arrivals is remembered under load"
    busy.rest(1.3)
    busy.arrive(50)
    assert choose(busy, one, 1.35).rungs, "a gap between two steps is no rest"
    busy.rest(1.4)
    busy.arrive(50)
    assert not choose(busy, one, 1.55).rungs


def test_no_room_is_an_empty_step() -> None:
    of = planner(policy="fixed:4")
    step = of.choose([Waiting("0", 9)], num_waiting=1, free_requests=0, now_s=1.0)
    assert not step.composites
    assert not choose(of, [], 2.0).composites


def test_capacity_is_known_once_it_was_measured() -> None:
    read = read_options({}, CONFIG)
    of = StepPlanner(CONFIG, read, NUM_LAYERS, AMPLE, now_s=0.0)
    assert of.capacity() == {"in_use": 0.0, "widest": 0.0}
    of.costs.observe_pass(tokens=100, rows=50, lower_s=0.1, upper_s=0.15)
    assert 0 < of.capacity()["in_use"] < of.capacity()["widest"]
    choose(of, [Waiting(str(i), LONGEST) for i in range(500)], 1.0)
    assert of.capacity()["in_use"] == of.capacity()["widest"]
