"""Drift from what a contract was calibrated for, and the interval of its live agreement."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, norm
from test_planning_options import CONTRACT

from revmux_vllm.planning.watching import DEVIATIONS, WINDOW, Drift, interval, too_much
from revmux_vllm.rungs import Rung

SHARES = (0.3, 0.4, 0.1)
STOPS = (Rung(stop=4), Rung(stop=5), Rung(stop=6))
LIKE = replace(CONTRACT, stops=STOPS, shares=SHARES, rows=1500)


def alarms(drift: Drift, shares: tuple[float, ...], requests: int, seed: int) -> int:
    """How often it cries, in steps of 20 requests."""
    rng = random.Random(seed)
    weights = [*shares, 1 - sum(shares)]
    cries = 0
    for _ in range(requests // 20):
        places = rng.choices(drift.names, weights, k=20)
        cries += drift.observe({name: places.count(name) for name in drift.names})
    return cries


def test_the_same_traffic_raises_no_alarm() -> None:
    assert sum(alarms(Drift(LIKE), SHARES, 20_000, seed) for seed in range(20)) == 0


@pytest.mark.parametrize("shares", [(0.1, 0.3, 0.2), (0.5, 0.3, 0.1), (0.3, 0.4, 0.29)])
def test_other_traffic_raises_one_within_a_thousand_requests(shares: tuple[float, ...]) -> None:
    drift = Drift(LIKE)
    assert alarms(drift, SHARES, WINDOW, 0) == 0
    assert alarms(drift, shares, 1000, 1) == 1
    assert drift.degree >= 1
    alarms(drift, SHARES, 1000, 2)
    assert drift.degree < 1, "it ends when the traffic is as before"
    assert alarms(drift, shares, 1000, 3) == 1, "and comes again"


def test_a_stop_that_nobody_left_at_is_no_trouble() -> None:
    drift = Drift(replace(LIKE, shares=(0.0, 0.7, 0.0)))
    assert alarms(drift, (0.0, 0.7, 0.0), 5000, 0) == 0
    assert alarms(drift, (0.2, 0.5, 0.0), 1000, 0) == 1


@pytest.mark.parametrize("freedom", [1, 3, 8])
def test_the_bound_is_that_of_the_textbook(freedom: int) -> None:
    assert too_much(freedom) == pytest.approx(chi2.isf(norm.sf(DEVIATIONS), freedom), rel=0.16)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_interval_is_around_the_share(count: int, share: float) -> None:
    hits = round(share * count)
    low, high = interval(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    assert interval(0, 0) == (0.0, 1.0)
