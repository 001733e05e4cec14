"""What steps cost and how much arrives, found again from what was measured."""

import random

import pytest

from revmux_vllm.planning.costs import ArrivalRate, LayerCosts


def test_costs_are_found_again() -> None:
    costs = LayerCosts(3, 12)
    rng = random.Random(0)
    for _ in range(100):
        tokens = rng.randint(30, 3000)
        for layers, rows in ((3, tokens), (9, tokens // rng.choice([1, 2, 4]))):
            noise = rng.uniform(0.95, 1.05)
            costs.observe(layers, rows, layers * (0.002 + 1e-5 * rows) * noise)
        costs.observe_overhead(0.01)
    a, b = costs.per_layer()
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


def test_rate_of_arrivals() -> None:
    rate = ArrivalRate(horizon_s=5, now=100.0)
    for second in range(60):
        rate.add(300)
        rate.update(101.0 + second)
    assert rate.tokens_per_s == pytest.approx(300, rel=0.01)
    assert rate.update(160.0) == pytest.approx(300, rel=0.01), "no time has passed"
    assert rate.update(190.0) < 1
