"""Every request in exactly one composite, similar lengths together, tenants apart."""

import itertools
import math
import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm.planning.packing import MuxPlan, alike, fallbacks, first_of, pack, pack_rungs
from revmux_vllm.rungs import Rung

widths_strategy = st.sets(st.integers(2, 9), max_size=4)


@given(
    requests=st.lists(st.tuples(st.integers(1, 600), st.sampled_from("abc")), max_size=120),
    widths=widths_strategy,
    max_tokens=st.sampled_from([math.inf, 1200, 600]),
)
def test_plan_properties(
    requests: list[tuple[int, str]], widths: set[int], max_tokens: float
) -> None:
    lengths = [length for length, _ in requests]
    domains = [domain for _, domain in requests]
    groups = pack(lengths, widths, domains, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(requests)))
    for group in groups:
        assert len(group) in widths | {1}
        assert len({domains[i] for i in group}) == 1
        assert lengths[group[0]] == max(lengths[i] for i in group), "the carrier is the longest"
        assert sum(lengths[i] for i in group) <= max_tokens, "a step has room for it"
    narrowest = min(widths, default=len(requests) + 1)
    for domain in set(domains):
        own = [i for i, its in enumerate(domains) if its == domain]
        own.sort(key=lengths.__getitem__, reverse=True)
        for place, i in enumerate(own):
            partners = [lengths[other] for other in own[place : place + narrowest]]
            has_partners = len(partners) == narrowest and sum(partners) <= max_tokens
            assert not ((i,) in groups and has_partners), "alone, though the next ones would fit"


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=64))
def test_groups_of_one_width_do_not_overlap_in_length(lengths: list[int]) -> None:
    groups = [sorted(lengths[i] for i in g) for g in pack(lengths, [4]) if len(g) == 4]
    for longer, shorter in itertools.pairwise(groups):
        assert longer[0] >= shorter[-1]


def test_leftovers_run_at_smaller_widths() -> None:
    assert [len(group) for group in pack([5] * 15, [2, 4, 8])] == [8, 4, 2, 1]


def test_a_composite_is_no_wider_than_a_step_has_room_for() -> None:
    groups = pack([400] * 9 + [100] * 7, [2, 4, 8], max_tokens=2048)
    assert [len(group) for group in groups] == [4, 4, 8]
    assert [len(group) for group in pack([400] * 9, [8], max_tokens=2048)] == [1] * 9
    packed = pack_rungs([400] * 9, [Rung(mux=4), Rung(mux=8)], exact={8}, max_tokens=2048)
    assert [str(rung) for rung, _ in packed] == ["mux:4", "mux:4", "alone"]


def test_no_widths_means_everyone_alone() -> None:
    assert pack([3, 1, 2], []) == [(0,), (2,), (1,)]


def test_the_same_arguments_give_the_same_plan() -> None:
    assert pack([4, 4, 4, 9], [2]) == pack([4, 4, 4, 9], [2]) == [(3, 0), (1, 2)]


def test_widths_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="widths: expected positive integers"):
        pack([1, 2], [0, 2])


def test_a_plan_refuses_duplicates() -> None:
    plan = MuxPlan((("b", "c"), ("a",)), (Rung(mux=2), Rung()))
    assert [(rung.mux, group) for rung, group in zip(plan.rungs, plan.groups, strict=True)] == [
        (2, ("b", "c")),
        (1, ("a",)),
    ]
    with pytest.raises(ValueError, match="more than one composite"):
        MuxPlan((("a", "b"), ("a",)), (Rung(mux=2), Rung()))
    with pytest.raises(ValueError, match="an empty composite"):
        MuxPlan(((),), (Rung(),))
    with pytest.raises(ValueError, match="plan: rungs"):
        MuxPlan((("a",),), (Rung(mux=2),))


@given(
    lengths=st.lists(st.integers(1, 600), max_size=64),
    merge=st.integers(1, 3),
    widths=st.sets(st.sampled_from([1, 2, 4])),
    stop=st.sampled_from([0, 7]),
)
def test_the_widest_serves_and_what_is_left_needs_no_partner(
    lengths: list[int], merge: int, widths: set[int], stop: int
) -> None:
    rungs = {Rung(merge, width, stop=stop) for width in widths}
    packed = pack_rungs(lengths, rungs)
    assert sorted(i for _, group in packed for i in group) == list(range(len(lengths)))
    assert {rung for rung, _ in packed} <= rungs | {Rung()}
    assert all(rung.mux == len(group) for rung, group in packed)
    best = max(rungs or {Rung()}, key=lambda rung: rung.mux)
    if len(lengths) >= best.mux:
        assert best in {rung for rung, _ in packed}
    if 1 in widths:
        assert {rung.way for rung, _ in packed} <= {best.way}


def test_leftovers_of_merged_composites_still_merge() -> None:
    rungs = [Rung(2, 2), Rung(2, 1)]
    assert [str(rung) for rung, _ in pack_rungs([5] * 3, rungs)] == ["merge:2+mux:2", "merge:2"]
    assert [str(rung) for rung, _ in pack_rungs([5] * 3, rungs[:1])] == ["merge:2+mux:2", "alone"]


lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(lengths=lengths_strategy, exact=st.sets(st.integers(0, 79)))
def test_who_asks_for_the_exact_answer_runs_alone(lengths: list[int], exact: set[int]) -> None:
    exact = {i for i in exact if i < len(lengths)}
    packed = pack_rungs(lengths, [Rung(mux=2), Rung(mux=4)], exact=exact)
    assert sorted(i for _, group in packed for i in group) == list(range(len(lengths)))
    assert all((Rung(), (i,)) in packed for i in exact)


@given(
    lengths=lengths_strategy,
    max_tokens=st.integers(60, 400),
    max_requests=st.integers(1, 40),
    domains=st.lists(st.sampled_from("ab"), min_size=80, max_size=80),
)
def test_a_step_keeps_its_budgets_and_takes_the_oldest(
    lengths: list[int], max_tokens: int, max_requests: int, domains: list[str]
) -> None:
    rungs = [Rung(mux=2), Rung(mux=4), Rung(mux=8)]
    packed = pack_rungs(lengths, rungs, domains[: len(lengths)])
    chosen = first_of(packed, lengths, rungs, max_tokens, max_requests)
    members = [i for _, group in chosen for i in group]
    assert len(set(members)) == len(members) <= max_requests
    assert sum(lengths[i] for i in members) <= max_tokens
    assert 0 in members
    upper_rows = sum(lengths[group[0]] for _, group in chosen)
    assert upper_rows <= sum(lengths[i] for i in members), "upper layers keep the budgets too"
    for _, group in chosen:
        assert len({domains[i] for i in group}) == 1
        assert lengths[group[0]] == max(lengths[i] for i in group)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120), arrivals=st.integers(0, 30))
def test_the_pth_is_overtaken_by_a_bounded_number(lengths: list[int], arrivals: int) -> None:
    """A queue that keeps growing while it is served, four sequences of 100 tokens a step."""
    rungs, widest = [Rung(mux=2), Rung(mux=4)], 4
    queue = [(i, length) for i, length in enumerate(lengths)]
    started = len(queue)
    overtaken = [0] * started
    ran: list[int] = []
    while queue:
        sizes = [length for _, length in queue]
        chosen = first_of(pack_rungs(sizes, rungs), sizes, rungs, 400, 16)
        now = {queue[i][0] for _, group in chosen for i in group}
        for i in now:
            for waiting, _ in queue:
                if waiting < i and waiting not in now and waiting < started:
                    overtaken[waiting] += 1
        ran += now
        queue = [entry for entry in queue if entry[0] not in now]
        if arrivals:
            arrivals -= 1
            queue += [(1000 * arrivals + 1000 + k, 50) for k in range(6)]
    assert len(set(ran)) == len(ran)
    for place, count in enumerate(overtaken):
        assert count <= (widest - 1) * place


def test_a_composite_beyond_the_budget_runs_in_part() -> None:
    rungs = [Rung(mux=2), Rung(mux=4)]
    packed = pack_rungs([10] * 4, rungs)
    assert [group for _, group in first_of(packed, [10] * 4, rungs, 35, 9)] == [(0, 1), (2,)]
    assert [group for _, group in first_of(packed, [10] * 4, rungs, 90, 2)] == [(0, 1)]


def test_one_longer_than_a_step_runs_by_itself_in_its_turn() -> None:
    rungs, lengths = [Rung(mux=2)], [90, 10, 10, 10]

    def ran(lengths: list[int], long: int, free: int = 9) -> list[tuple[int, ...]]:
        packed = pack_rungs(lengths, rungs, exact={long}, max_tokens=40)
        return [group for _, group in first_of(packed, lengths, rungs, 40, free)]

    assert ran([90, 10, 10, 10], 0) == [(0,)]
    assert ran([10, 10, 90, 10], 2) == [(0, 1)], "those who waited longer run first"
    assert ran(lengths, 0, free=0) == []


def test_who_just_came_may_wait_while_a_full_composite_runs() -> None:
    rungs = [Rung(mux=2), Rung(mux=4)]

    def ran(lengths: list[int], fresh: set[int]) -> list[tuple[int, ...]]:
        packed = pack_rungs(lengths, rungs)
        return [group for _, group in first_of(packed, lengths, rungs, 900, 90, fresh)]

    assert ran([9, 9, 9, 9, 5], {0, 1, 2, 3, 4}) == [(0, 1, 2, 3)]
    assert ran([9, 9, 9, 9, 5], {1, 2, 3}) == [(0, 1, 2, 3), (4,)], "it has waited before"
    assert ran([5, 9, 9, 9, 9], {1, 2, 3, 4}) == [(0,), (1, 2, 3, 4)]
    assert ran([9, 9, 5], {0, 1, 2}) == [(0, 1), (2,)], "no full one runs meanwhile"


def test_reasons_to_run_alone() -> None:
    assert fallbacks([("a", ""), ("a", "exact")], None) == {"no_partner": 1, "exact": 1}
    assert fallbacks([("a", ""), ("b", "")], None) == {"isolation": 2}
    assert fallbacks([("a", ""), ("b", "")], "light_load") == {"light_load": 2}
    assert fallbacks([("a", "long"), ("b", "")], "light_load") == {"light_load": 1, "long": 1}
    assert fallbacks([], "light_load") == {}


def test_padding_of_a_log_normal_mix_is_under_five_percent() -> None:
    rng = random.Random(0)
    lengths = [max(1, min(512, int(rng.lognormvariate(3.5, 0.8)))) for _ in range(512)]
    groups = pack(lengths, [2, 4])
    assert sum(lengths[group[0]] * len(group) for group in groups) < 1.05 * sum(lengths)


def test_planning_1024_requests_takes_under_four_milliseconds() -> None:
    """Best of many runs, so that a busy machine does not fail it; the benchmark has the median."""
    lengths = [(i * 7919) % 500 + 1 for i in range(1024)]
    rungs = [Rung(mux=2), Rung(mux=4), Rung(mux=8)]
    times = []
    for _ in range(30):
        start = time.perf_counter()
        first_of(pack_rungs(lengths, rungs, [None] * 1024), lengths, rungs, 2048, 128)
        times.append(time.perf_counter() - start)
    assert min(times) < 4e-3


@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=60),
    least=st.integers(2, 5),
)
def test_what_begins_alike(texts: list[list[int]], least: int) -> None:
    blocks = [[tuple(text[: i + 1]) for i in range(len(text))] for text in texts]
    found = alike(blocks, least)
    classes: dict[object, list[int]] = {}
    for i, name in enumerate(found):
        assert name is None or name in blocks[i]
        classes.setdefault(name, []).append(i)
    classes.pop(None, None)
    for name, members in classes.items():
        length = len(name)  # type: ignore[arg-type]
        assert len(members) >= least
        longer = Counter(blocks[i][length] for i in members if len(blocks[i]) > length)
        assert max(longer.values(), default=0) < least, "enough of them share more"


def test_instructions_are_found() -> None:
    blocks = [[f"{i % 7} {j}" for j in range(5 + i % 7)] + [f"own {i}"] for i in range(70)]
    assert alike(blocks, 4) == [f"{i % 7} {4 + i % 7}" for i in range(70)]


def test_who_begins_alike_is_a_partner_where_there_are_enough() -> None:
    prefixes = [None, "a", "b", "a", "b", "a", "b", "a", None]
    packed = pack_rungs([5] * 9, [Rung(mux=2), Rung(mux=4)], prefixes=prefixes)
    assert packed == [
        (Rung(mux=4), (1, 3, 5, 7)),
        (Rung(mux=4), (0, 2, 4, 6)),  # three of "b" would make a narrow composite
        (Rung(), (8,)),
    ]
    apart = pack_rungs([5] * 4, [Rung(mux=2)], list("xyxy"), prefixes=["a"] * 4)
    assert [group for _, group in apart] == [(0, 2), (1, 3)], "tenants"
