"""Which rung for which load, and what the options make of it."""

import math
import random
from collections import Counter
from typing import Any

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.costs import Backlog, Budgets, LayerCosts
from revmux_vllm.planning.options import read_options
from revmux_vllm.planning.planner import Composite, StepPlanner, Waiting
from revmux_vllm.planning.policy import ByLoad, Fixed, Policy
from revmux_vllm.rungs import parse_rungs

CONFIG = RevMuxConfig(parse_rungs(["mux:2", "mux:4", "merge:2", "exit"]), prefill_layers=3)
NUM_LAYERS = 12
MS_PER_TOKEN = 1.0
BUDGETS = Budgets(max_tokens=2048, max_requests=128)


def measured() -> LayerCosts:
    """A millisecond a token through all layers, 5 ms a step."""
    costs = LayerCosts(CONFIG.prefill_layers, NUM_LAYERS)
    for tokens in (16, 64, 256):
        costs.observe(NUM_LAYERS, tokens, MS_PER_TOKEN * tokens / 1000)
    costs.observe_overhead(0.005)
    return costs


def planner(**options: Any) -> StepPlanner:
    read = read_options({"revmux": options}, CONFIG)
    return StepPlanner(CONFIG, read, NUM_LAYERS, BUDGETS, now_s=0.0, costs=measured())


def policy(**options: Any) -> Policy:
    return planner(**options).policy


def rungs(chooser: Policy, num_tokens: int, tokens_per_s: float = 0.0) -> list[str]:
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


def test_long_texts_are_merged_where_attention_takes_the_time() -> None:
    """mux:8 leaves an eighth of the rows and of the pairs, merge:4 a quarter and a sixteenth."""
    config = RevMuxConfig(parse_rungs(["merge:4", "mux:8"]), prefill_layers=3)
    costs = LayerCosts(config.prefill_layers, NUM_LAYERS)
    for tokens in (16, 64, 256, 1024):  # of one text, whose rows cost nearly nothing
        costs.observe(1, tokens, 1e-7 * tokens + 1e-8 * tokens**2, tokens**2)
    read = read_options({}, config)

    def chosen(policy: Policy, length: int, num_requests: int) -> list[str]:
        backlog = Backlog(num_requests, num_requests * length, length=length)
        return list(map(str, policy.rungs(backlog)))

    short, long = (ByLoad(config, read, costs, BUDGETS) for _ in range(2))
    assert chosen(short, 16, 10**6) == ["mux:8"]
    assert chosen(long, 2048, 10**4) == ["merge:4"], "nothing keeps up, and it is the fastest"
    for policy in (short, long):
        assert chosen(policy, 2048, 5) == ["merge:4"], "it is faster than mux:8, and saves less"
        assert chosen(policy, 2048, 1) == []


def test_pressure_multiplexes_also_while_costs_are_not_known() -> None:
    """Ten full steps fill the horizon, however long it is, and a rung saves rows above the cut."""
    costs = LayerCosts(CONFIG.prefill_layers, NUM_LAYERS)
    horizon_ms, full = 50, BUDGETS.max_tokens
    options = read_options({"revmux": {"target_ms": horizon_ms}}, CONFIG)
    chooser = ByLoad(CONFIG, options, costs, BUDGETS)
    assert chooser.window > 1
    assert rungs(chooser, full) == []
    assert rungs(chooser, 11 * full) == ["merge:2"]
    assert rungs(chooser, 17 * full) == ["mux:2", "mux:4"]
    assert rungs(chooser, 600 * 50) == ["mux:2", "mux:4"], "narrower with room to spare"
    assert rungs(chooser, 50) == []
    costs.observe(NUM_LAYERS, full, 1e-6)
    assert rungs(chooser, 17 * full) == [], "costs that came later count"


def serve(
    planner: StepPlanner, requests_per_s: float, seconds: float = 300
) -> tuple[Counter[str], float]:
    """Poisson arrivals of 50 tokens; requests by rung, and the 99th percentile of latency in s."""
    rng = random.Random(1)
    now, next_arrival = 0.0, 0.0
    waiting: list[Waiting] = []
    latencies: list[float] = []
    ran: Counter[str] = Counter()
    while now < seconds or waiting:
        while next_arrival <= now and next_arrival < seconds:
            waiting.append(Waiting(f"at {next_arrival}", 50, arrived_s=next_arrival))
            planner.arrive(50)
            next_arrival += rng.expovariate(requests_per_s)
        if not waiting:
            now = next_arrival
            if now >= seconds:
                break
            continue
        composites, step_s = run_step(planner, waiting, now)
        now += step_s
        for rung, group in composites:
            ran[str(rung)] += len(group)
            latencies += [now - member.arrived_s for member in group]
    return ran, sorted(latencies)[math.floor(0.99 * len(latencies))]


def run_step(
    planner: StepPlanner, waiting: list[Waiting], now: float
) -> tuple[tuple[Composite, ...], float]:
    """A step's composites, which leave ``waiting``, and how long it takes."""
    window = waiting[: planner.window]
    step = planner.choose(window, len(waiting), planner.budgets.max_requests, now)
    members = set(step.members)
    waiting[:] = [request for request in waiting if request not in members]
    rows = sum(group[0].num_tokens / rung.merge for rung, group in step.composites)
    tokens = sum(request.num_tokens for request in members)
    return step.composites, planner.costs.seconds(tokens, rows)


def test_in_a_queue() -> None:
    """20 requests/s is what the backbone alone can do; by layers 2.3 times as much at width 4."""
    muxes = {"rungs": ["mux:2", "mux:4"]}
    ran, latency_s = serve(planner(**muxes), 5)
    assert set(ran) == {"alone"}, "a quarter of its capacity is answered by the backbone alone"
    assert latency_s < 0.5
    ran, latency_s = serve(planner(**muxes), 36)
    assert latency_s < 2, "1.8 times what the backbone could do, and the queue does not grow"
    _, alone_s = serve(planner(policy="off"), 36)
    assert alone_s > 50
    ran, _ = serve(planner(**muxes), 24)
    assert ran["mux:2"] > ran["mux:4"], "no wider than it must be"


def test_full_load_is_as_fast_as_the_fixed_width() -> None:
    def drained_s(planner: StepPlanner) -> float:
        waiting, now = [Waiting(str(i), 50) for i in range(2000)], 0.0
        while waiting:
            now += run_step(planner, waiting, now)[1]
        return now

    by_load = drained_s(planner(rungs=["mux:2", "mux:4"]))
    assert by_load < drained_s(planner(policy="fixed:4")) / 0.95


def test_fixed_is_a_policy_for_a_set_of_rungs() -> None:
    assert Fixed(parse_rungs(["mux:4"]), LayerCosts(1, 4)).rungs(Backlog(1, 1)) == parse_rungs(
        ["mux:4"]
    )
