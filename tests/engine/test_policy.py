"""Which rung for which load, and the options that say so."""

import math
import random
from collections import Counter
from typing import Any

import pytest

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.costs import ArrivalRate, Backlog, LayerCosts
from revmux_vllm.engine.policy import ByLoad, Fixed, make_policy, read_options
from revmux_vllm.packing import first_of, pack_rungs
from revmux_vllm.rungs import parse_rungs

CONFIG = RevMuxConfig(parse_rungs(["mux:2", "mux:4", "merge:2", "exit"]), prefill_layers=3)
NUM_LAYERS = 12
MS_PER_TOKEN = 1.0


def measured() -> LayerCosts:
    """A millisecond a token through all layers, 5 ms a step."""
    costs = LayerCosts(CONFIG.prefill_layers, NUM_LAYERS)
    for tokens in (16, 64, 256):
        costs.observe(NUM_LAYERS, tokens, MS_PER_TOKEN * tokens / 1000)
    costs.observe_overhead(0.005)
    return costs


def policy(**options: Any) -> Any:
    read = read_options({"revmux": options}, CONFIG)
    return make_policy(CONFIG, read, measured(), max_tokens=2048, max_requests=128)


def rungs(chooser: Any, num_tokens: int, tokens_per_s: float = 0.0) -> list[str]:
    backlog = Backlog(max(1, num_tokens // 50), num_tokens, tokens_per_s)
    return list(map(str, chooser.rungs(backlog)))


def test_light_load_runs_alone_and_heavy_load_as_wide_as_it_must() -> None:
    assert rungs(policy(), 50, 250) == []
    assert rungs(policy(), 900) == []
    # 1,200 ms of work alone; at a saving of two 750 ms. Merging wins a tie.
    assert rungs(policy(), 1200) == ["merge:2"]
    assert rungs(policy(), 1900) == ["mux:2", "mux:4"]
    assert rungs(policy(), 100_000) == ["mux:2", "mux:4"], "the widest where none keeps up"
    assert rungs(policy(rungs=["mux:2", "mux:4", "exit"]), 100_000) == ["exit"]
    assert rungs(policy(), 100, 1100) == ["merge:2"], "what arrives counts as what waits"


def test_it_widens_at_once_and_narrows_with_room_to_spare() -> None:
    chooser = policy()
    assert rungs(chooser, 1900) == ["mux:2", "mux:4"]
    assert rungs(chooser, 900) == ["merge:2"], "alone it would take 0.9 of the horizon"
    assert rungs(chooser, 700) == ["merge:2"]
    assert rungs(chooser, 500) == []
    assert rungs(chooser, 700) == []


def test_options() -> None:
    assert rungs(policy(max_width=2, rungs=["mux:2", "mux:4"]), 100_000) == ["mux:2"]
    assert rungs(policy(max_width=1), 100_000) == ["merge:2"]
    assert rungs(policy(min_width=2), 1) == ["merge:2"]
    assert rungs(policy(min_width=4), 1) == ["mux:2", "mux:4"]
    assert rungs(policy(rungs=[]), 100_000) == []
    assert rungs(policy(target_ms=100), 200) == ["mux:2", "mux:4"]
    assert rungs(policy(policy="off"), 100_000) == []
    assert rungs(policy(policy="fixed:4"), 1) == ["mux:2", "mux:4"]
    assert rungs(policy(policy="fixed:merge:2"), 1) == ["merge:2"]
    assert rungs(policy(policy="fixed:exit", rungs=["exit"]), 1) == ["exit"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"linger": 3},
            "unknown key linger; known are isolate, linger_ms, max_width, min_width, policy, "
            "rungs, target_ms",
        ),
        ({"max_width": 3}, r"max_width: expected one of \[1, 2, 4\], found 3"),
        ({"max_width": True}, r"max_width: expected one of \[1, 2, 4\], found True"),
        ({"min_width": 3}, r"min_width: expected one of \[1, 2, 4\], found 3"),
        ({"linger_ms": -1}, "linger_ms: expected milliseconds, found -1"),
        ({"linger_ms": "5"}, "linger_ms: expected milliseconds, found '5'"),
        ({"target_ms": 0}, "target_ms: expected milliseconds, above 0, found 0"),
        ({"isolate": 1}, "isolate: expected true or false, found 1"),
        (
            {"policy": "fixed:8"},
            "policy: expected one of load, off, fixed:mux:2, fixed:mux:4, fixed:merge:2, fixed:2, "
            "fixed:4, found 'fixed:8'",
        ),
        ({"policy": 4}, "policy: expected one of load, off, .*found 4"),
        (
            {"rungs": ["mux:8"]},
            "rungs: the checkpoint has no mux:8; it has exit, mux:2, mux:4, merge:2",
        ),
        ({"rungs": ["x"]}, "rungs: rung 'x': expected exit, mux:N"),
        ({"rungs": "mux:2"}, "rungs: expected a list, found 'mux:2'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options({"revmux": options}, CONFIG)


def test_options_of_other_plugins_are_left_alone() -> None:
    assert read_options({"other": {"x": 1}}, CONFIG).policy == "load"
    assert read_options(None, CONFIG).rungs == parse_rungs(["mux:2", "mux:4", "merge:2"])


def test_the_first_request_runs_by_itself_to_be_measured() -> None:
    options = read_options({}, CONFIG)
    costs = LayerCosts(CONFIG.prefill_layers, NUM_LAYERS)
    chooser = ByLoad(CONFIG, options, costs, 2048, 128)
    assert chooser.window == 1
    assert chooser.rungs(Backlog(1000, 50_000)) == ()
    costs.observe(3, 50, 0.0125)
    assert chooser.window > 1
    assert chooser.rungs(Backlog(1000, 50_000)) != ()


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


def serve(chooser: Any, requests_per_s: float, seconds: float = 300) -> tuple[Counter[str], float]:
    """Poisson arrivals of 50 tokens; requests by rung, and the 99th percentile of latency in s."""
    rng = random.Random(1)
    costs, arrivals = chooser_costs(chooser), ArrivalRate(5, 0.0)
    now, last, next_arrival = 0.0, 0.0, 0.0
    waiting: list[float] = []
    latencies: list[float] = []
    ran: Counter[str] = Counter()
    while now < seconds or waiting:
        while next_arrival <= now and next_arrival < seconds:
            waiting.append(next_arrival)
            arrivals.add(50)
            next_arrival += rng.expovariate(requests_per_s)
        if not waiting:
            now = next_arrival
            if now >= seconds:
                break
            continue
        backlog = Backlog(len(waiting), 50 * len(waiting), arrivals.update(now))
        allowed = chooser.rungs(backlog)
        lengths = [50] * len(waiting)
        fresh = {i for i, at in enumerate(waiting) if at > last}
        last = now
        packed = pack_rungs(lengths, allowed)
        chosen = first_of(packed, lengths, allowed, 2048, 128, fresh if chooser.defers else ())
        rows = sum(50 / rung.merge for rung, _ in chosen)
        members = sorted(i for _, group in chosen for i in group)
        now += costs.seconds(50 * len(members), rows)
        for rung, group in chosen:
            ran[str(rung)] += len(group)
        latencies += [now - waiting[i] for i in members]
        waiting = [at for i, at in enumerate(waiting) if i not in set(members)]
    return ran, sorted(latencies)[math.floor(0.99 * len(latencies))]


def chooser_costs(chooser: Any) -> LayerCosts:
    return chooser.costs if isinstance(chooser, ByLoad) else measured()


def test_in_a_queue() -> None:
    """20 requests/s is what the backbone alone can do; by layers 2.3 times as much at width 4."""
    muxes = {"rungs": ["mux:2", "mux:4"]}
    ran, latency_s = serve(policy(**muxes), 5)
    assert set(ran) == {"alone"}, "a quarter of its capacity is answered by the backbone alone"
    assert latency_s < 0.5
    ran, latency_s = serve(policy(**muxes), 36)
    assert latency_s < 2, "1.8 times what the backbone could do, and the queue does not grow"
    _, alone_s = serve(policy(policy="off"), 36)
    assert alone_s > 50
    ran, _ = serve(policy(**muxes), 24)
    assert ran["mux:2"] > ran["mux:4"], "no wider than it must be"


def test_full_load_is_as_fast_as_the_fixed_width() -> None:
    def drained_s(chooser: Any) -> float:
        costs, left, now = chooser_costs(chooser), 2000, 0.0
        while left:
            allowed = chooser.rungs(Backlog(left, 50 * left))
            lengths = [50] * min(left, 1024)
            chosen = first_of(pack_rungs(lengths, allowed), lengths, allowed, 2048, 128)
            count = sum(len(group) for _, group in chosen)
            now += costs.seconds(50 * count, 50 * len(chosen))
            left -= count
        return now

    by_load = drained_s(policy(rungs=["mux:2", "mux:4"]))
    assert by_load < drained_s(policy(policy="fixed:4")) / 0.95


def test_fixed_is_a_policy_for_a_set_of_rungs() -> None:
    assert Fixed(parse_rungs(["mux:4"])).rungs(Backlog(1, 1)) == parse_rungs(["mux:4"])
