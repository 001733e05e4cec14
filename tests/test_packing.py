"""Every request in exactly one composite, similar lengths together, tenants apart."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm.packing import MuxPlan, pack, plan_requests

widths_strategy = st.sets(st.integers(2, 9), max_size=4)


@given(
    requests=st.lists(st.tuples(st.integers(1, 600), st.sampled_from("abc")), max_size=120),
    widths=widths_strategy,
)
def test_plan_properties(requests: list[tuple[int, str]], widths: set[int]) -> None:
    lengths = [length for length, _ in requests]
    domains = [domain for _, domain in requests]
    groups = pack(lengths, widths, domains)
    assert sorted(i for group in groups for i in group) == list(range(len(requests)))
    for group in groups:
        assert len(group) in widths | {1}
        assert len({domains[i] for i in group}) == 1
        assert lengths[group[0]] == max(lengths[i] for i in group), "the carrier is the longest"
    for domain in set(domains):
        alone = [g for g in groups if len(g) == 1 and domains[g[0]] == domain]
        assert len(alone) < min(widths, default=len(requests) + 1)


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=64))
def test_groups_of_one_width_do_not_overlap_in_length(lengths: list[int]) -> None:
    groups = [sorted(lengths[i] for i in g) for g in pack(lengths, [4]) if len(g) == 4]
    for longer, shorter in itertools.pairwise(groups):
        assert longer[0] >= shorter[-1]


def test_leftovers_run_at_smaller_widths() -> None:
    assert [len(group) for group in pack([5] * 15, [2, 4, 8])] == [8, 4, 2, 1]


def test_no_widths_means_everyone_alone() -> None:
    assert pack([3, 1, 2], []) == [(0,), (2,), (1,)]


def test_the_same_arguments_give_the_same_plan() -> None:
    assert pack([4, 4, 4, 9], [2]) == pack([4, 4, 4, 9], [2]) == [(3, 0), (1, 2)]


def test_widths_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="widths: expected positive integers"):
        pack([1, 2], [0, 2])


def test_a_plan_knows_its_counts_and_refuses_duplicates() -> None:
    plan = plan_requests(["a", "b", "c"], [1, 5, 4], [2])
    assert plan.groups == (("b", "c"), ("a",))
    assert plan.counts() == {1: 1, 2: 2}
    with pytest.raises(ValueError, match="more than one composite"):
        MuxPlan((("a", "b"), ("a",)))
    with pytest.raises(ValueError, match="an empty composite"):
        MuxPlan(((),))


def test_planning_1024_requests_takes_under_two_milliseconds() -> None:
    """Best of many runs, so that a busy machine does not fail it; the benchmark has the median."""
    ids = [str(i) for i in range(1024)]
    lengths = [(i * 7919) % 500 + 1 for i in range(1024)]
    times = []
    for _ in range(30):
        start = time.perf_counter()
        plan_requests(ids, lengths, [2, 4, 8], [None] * 1024)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3
