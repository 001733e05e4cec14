"""What steps cost and how much arrives, found again from what was measured."""

import random
from collections.abc import Sequence

import pytest

from revmux_vllm.planning.costs import ArrivalRate, LayerCosts
from revmux_vllm.rungs import Rung

A, B, C = 5e-4, 2e-6, 2e-9
"""Seconds of a layer, of its rows and of its pairs: at 1,000 tokens attention takes half."""
MERGE, MUX = Rung(merge=2), Rung(mux=2)


def run(costs: LayerCosts, lengths: Sequence[int], rungs: Sequence[Rung], steps: int) -> None:
    """Steps of whole texts, each step at one rung, timed with errors of five per cent."""
    rng = random.Random(0)

    def timed(layers: int, rows: float, pairs: float) -> float:
        return (layers * (A + B * rows) + C * pairs) * rng.uniform(0.95, 1.05)

    for _ in range(steps):
        rung, composites = rng.choice(rungs), rng.randint(1, 8)
        texts = [rng.choice(lengths) for _ in range(composites)]
        tokens = rung.mux * sum(texts)
        rows = tokens / costs.saving(rung)
        pairs = costs.pairs([(rung, [(text, text)] * rung.mux) for text in texts])
        seconds = timed(3, tokens, pairs.lower), timed(9, rows, pairs.upper)
        costs.observe_pass(tokens, rows, *seconds, pairs)


def test_costs_are_found_again() -> None:
    costs = LayerCosts(3, 12)
    rng = random.Random(0)
    for _ in range(100):
        tokens = rng.randint(30, 3000)
        for layers, rows in ((3, tokens), (9, tokens // rng.choice([1, 2, 4]))):
            noise = rng.uniform(0.95, 1.05)
            costs.observe(layers, rows, layers * (0.002 + 1e-5 * rows) * noise)
        costs.observe_overhead(0.01)
    a, b, c = costs.per_layer()
    assert c == 0, "nothing attended to anything"
    assert a == pytest.approx(0.002, rel=0.35)
    assert b == pytest.approx(1e-5, rel=0.1)
    assert costs.seconds(1000, 500) == pytest.approx(0.01 + 0.024 + 0.03 + 0.045, rel=0.1)


def test_costs_stay_sane_on_odd_measurements() -> None:
    costs = LayerCosts(3, 12)
    assert costs.seconds(100, 100) == 0.0
    costs.observe(3, 64, 0.03)  # one size says nothing of a fixed part
    assert costs.seconds(64, 64) == pytest.approx(0.12, rel=0.05)
    assert costs.seconds(640, 640) == pytest.approx(1.2, rel=0.2)
    costs.observe(9, 0, 0.0)  # where all exit
    for rows, seconds in ((60, 0.05), (70, 0.03)):  # the larger was faster
        costs.observe(3, rows, seconds)
    assert costs.seconds(128, 128) > costs.seconds(16, 16) >= 0


def test_attention_s_part_is_found() -> None:
    costs = LayerCosts(3, 12)
    run(costs, [30, 128, 500, 1000, 2000], [Rung(), MERGE, MUX], steps=200)
    assert costs.per_layer() == (
        pytest.approx(A, rel=0.5),
        pytest.approx(B, rel=0.1),
        pytest.approx(C, rel=0.1),
    )
    # Above the cut half the rows, and of the pairs a half or a quarter.
    for rung, pairs in ((MUX, 1 / 2), (MERGE, 1 / 4)):
        attention = C * 8000 * 2000 * (3 + 9 * pairs)
        seconds = 12 * A + B * 8000 * (3 + 9 / 2) + attention
        assert costs.seconds_at(rung, 8000, length=2000) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("lengths", [[30], [2048], range(1900, 2049)])
def test_texts_that_are_alike_say_nothing_of_attention_s_part(lengths: Sequence[int]) -> None:
    """It counts as the rows', which is right for these texts, and too little for longer ones."""
    costs, length = LayerCosts(3, 12), lengths[-1]
    run(costs, lengths, [Rung()], steps=200)
    a, b, c = costs.per_layer()
    assert 0 <= a < 2 * A
    assert c < 0.5 * C
    assert b + c * length == pytest.approx(B + C * length, rel=0.2)
    assert costs.seconds_at(MERGE, 8000, length) >= 0.95 * (
        12 * A + B * 8000 * (3 + 9 / 2) + C * 8000 * length * (3 + 9 / 4)
    )


def test_who_attends_to_whom() -> None:
    costs = LayerCosts(1, 4, windows=[None, 4, None, 4])  # one layer below the cut
    lower, ten, six = 10**2 + 6**2, 8 * 10 + 10**2 + 8 * 10, 3 * 6**2
    alone = [(Rung(), [(10, 10)]), (Rung(), [(6, 6)])]
    assert costs.pairs(alone) == (lower, ten + six, ten + six)
    assert costs.pairs([(MUX, [(10, 10), (6, 6)])]) == (lower, ten, ten + six)
    assert costs.pairs([(MERGE, [(10, 10)])]) == (100, 3 * 5**2, ten)
    assert costs.pairs([(Rung(exit=True), [(10, 10)])]).upper == 0
    assert costs.pairs([(Rung(stop=2), [(10, 10)])]).upper == pytest.approx(ten / 3)
    behind_cache = costs.pairs([(Rung(), [(2, 18)])])  # two of ten, and both sides of the eight
    assert behind_cache == (36, 16 + 36 + 16, 16 + 36 + 16)


def test_rate_of_arrivals() -> None:
    rate = ArrivalRate(horizon_s=5, now=100.0)
    for second in range(60):
        rate.add(300)
        rate.update(101.0 + second)
    assert rate.tokens_per_s == pytest.approx(300, rel=0.01)
    assert rate.update(160.0) == pytest.approx(300, rel=0.01), "no time has passed"
    assert rate.update(190.0) < 1
