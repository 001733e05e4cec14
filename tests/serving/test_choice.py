"""Which replica gets a request."""

from hypothesis import given, settings
from hypothesis import strategies as st

from revmux_vllm.serving.choice import Load, MeanChars, choose
from revmux_vllm.serving.messages import Work

FILL_S = 1.0


def holding(*works: Work, chars_per_s: float = 100.0) -> Load:
    load = Load(chars_per_s)
    for work in works:
        load.add(work)
    return load


def work(chars: int = 10, domain: str | None = None) -> Work:
    return Work(chars, chars.bit_length(), domain)


def test_one_replica_is_filled_before_the_next_is_opened() -> None:
    loads = [holding() for _ in range(3)]
    order = []
    for _ in range(22):
        order.append(choose(work(), loads, FILL_S))
        loads[order[-1]].add(work())
    assert order == [0] * 10 + [1] * 10 + [2] * 2


def test_when_all_are_full_the_one_that_is_done_first() -> None:
    loads = [holding(*[work()] * 12), holding(*[work()] * 11), holding(*[work()] * 13)]
    assert choose(work(), loads, FILL_S) == 1
    faster = holding(*[work()] * 20, chars_per_s=1000.0)
    assert choose(work(), [*loads, faster], FILL_S) == 3


def test_partners_stay_together() -> None:
    loads = [holding(work(), work(), work()), holding(work(domain="a")), holding()]
    assert choose(work(domain="a"), loads, FILL_S) == 1, "of its own domain"
    assert choose(work(domain="b"), loads, FILL_S) == 0, "the first open one"
    assert choose(work(), loads, FILL_S) == 0
    short, long = work(chars=10), work(chars=40)
    loads = [holding(short), holding(long), holding()]
    assert choose(long, loads, FILL_S) == 1, "of its own length"
    assert choose(short, loads, FILL_S) == 0


def test_a_request_larger_than_a_replica_still_goes_somewhere() -> None:
    assert choose(work(chars=10_000), [holding(work()), holding()], FILL_S) == 1
    assert choose(work(chars=10_000), [holding(work())], FILL_S) == 0


def test_what_others_have_sent_counts() -> None:
    mean = MeanChars()
    mean.add(work(chars=20))
    mean.add(work(chars=40))
    busy = holding(work())
    busy.see(4, mean.value)
    assert busy.elsewhere == 3 * 30
    assert choose(work(), [busy, holding()], FILL_S) == 1
    busy.see(0, mean.value)
    assert busy.elsewhere == 0


works = st.builds(work, st.integers(1, 500), st.sampled_from([None, "a", "b"]))


@settings(deadline=None)
@given(st.lists(works, max_size=60), st.integers(1, 6), st.floats(0.05, 5.0))
def test_nobody_gets_more_than_its_fill_while_another_is_empty(
    sent: list[Work], num_replicas: int, fill_s: float
) -> None:
    loads = [holding() for _ in range(num_replicas)]
    for one in sent:
        chosen = loads[choose(one, loads, fill_s)]
        chosen.add(one)
        overfull = chosen.backlog_s > fill_s and chosen.kinds.total() > 1
        assert not overfull or all(load.chars > 0 for load in loads)
    for one in sent:
        holder = next(load for load in loads if load.kinds[one.kind] > 0)
        holder.remove(one)
    assert all(abs(sum(load.kinds.values())) == 0 for load in loads)
