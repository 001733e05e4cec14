"""The simulation of routers: small clusters, and what it says of itself."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import typer
from router_simulation.engine import Engine
from router_simulation.routers import ROUTERS, PackAware
from router_simulation.setting import Calibration, Setting
from router_simulation.simulation import Simulation, measure
from router_simulation.traffic import Request, Traffic
from simulate_router import main
from typer.testing import CliRunner

from revmux_vllm.planning.costs import Budgets
from revmux_vllm.planning.options import read_options
from revmux_vllm.planning.planner import StepPlanner, Waiting
from revmux_vllm.rungs import Ends, Rung, row_counts
from revmux_vllm.serving.messages import Work

BASE = Setting(replicas=4)


def test_the_engine_is_the_measured_one() -> None:
    costs = Calibration().costs()
    assert costs.seconds(32, 32) == pytest.approx(0.142, rel=0.02), "one request at light load"
    alone = costs.tokens_per_s(Rung(), 2048)
    assert alone / 32 == pytest.approx(9.9, rel=0.02), "plain vLLM's burst"
    assert Calibration().tokens_per_s / alone == pytest.approx(2.27, rel=0.02)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_answered_once(router: str) -> None:
    simulated = Simulation(replace(BASE, router=router, fronts=2, tenants=0.3))
    answered: list[Request] = []
    answer = simulated._answer

    def counted(now: float, request: Request) -> None:
        answered.append(request)
        answer(now, request)

    simulated._answer = counted  # type: ignore[method-assign]
    tally = simulated.run()
    traffic, expected = Traffic(simulated.setting), 0
    while traffic.next():
        expected += 1
    assert len(answered) == len(set(map(id, answered))) == expected
    assert all(not engine.under_way for engine in simulated.engines)
    assert min(tally.latencies_s) > 2 * BASE.delay_s
    for each in simulated.routers:
        if isinstance(each, PackAware):
            assert all(load.chars == 0 == load.kinds.total() for load in each.loads)


def test_the_same_traffic_and_seed_give_the_same_numbers() -> None:
    def measured(setting: Setting) -> dict[str, object]:
        return measure(setting) | {"cpu_s": None}

    assert measured(BASE) == measured(BASE)
    assert measured(BASE) != measured(replace(BASE, seed=1))
    others = [replace(BASE, router=router) for router in ROUTERS]
    assert len({measure(setting)["requests"] for setting in others}) == 1


def test_one_replica_is_the_same_for_every_router() -> None:
    alone = replace(BASE, replicas=1)
    rows = [measure(replace(alone, router=name)) for name in ROUTERS]
    assert len({(row["p99_ms"], row["width"]) for row in rows}) == 1


def test_light_load_is_answered_by_the_backbone() -> None:
    row = measure(replace(BASE, router="power-of-two", load=0.03, shape=1.0, peak=1.0))
    assert row["width"] < 1.05
    assert row["p50_ms"] == pytest.approx(170, rel=0.3)
    assert row["throughput_per_s"] == pytest.approx(row["offered_per_s"], rel=0.1)


def test_packing_is_wider_and_computes_less() -> None:
    packed = measure(replace(BASE, load=0.3, fill_s=0.5))
    other = measure(replace(BASE, load=0.3, router="power-of-two"))
    assert packed["width"] > 1.2 * other["width"]
    assert packed["busy"] < other["busy"]


def request(replica: int, tokens: int = 10) -> Request:
    return Request(0.0, tokens, Work(4 * tokens, 6), front=0, replica=replica)


def test_the_books_are_those_of_the_router() -> None:
    books = PackAware(2, chars_per_s=100.0, fill_s=1.0, rng=random.Random(0))
    first = request(0)
    books.on_send(first, 0.0)
    assert books.loads[0].elsewhere == 0
    books.on_accept(first, 4, 0.1)
    assert books.loads[0].elsewhere == 3 * 40, "as long as those of its own"
    books.on_answer(first, 0.2)
    assert books.loads[0].elsewhere > 0, "the others are still there"
    books.choose(first.work, 10.1)
    assert books.loads[0].elsewhere > 0
    books.choose(first.work, 10.3)
    assert books.loads[0].elsewhere == 0, "Ray forgets after ten seconds"


def test_its_engines_plan_as_the_planner_does() -> None:
    """A queue that grows from step to step: every step is what a planner made by hand says."""
    calibration = Calibration(rungs=("mux:2", "mux:4", "merge:2"), max_tokens=256, max_requests=12)
    costs = calibration.costs()
    engine = Engine(calibration, costs)
    config = calibration.config
    budgets = Budgets(calibration.max_tokens, calibration.max_requests)
    planner = StepPlanner(config, read_options({}, config), calibration.layers, budgets, 0.0, costs)
    assert type(engine.planner) is StepPlanner
    rng = random.Random(0)
    waiting: list[Waiting] = []
    now, used = 0.0, set()
    for number in range(200):
        for _ in range(rng.choice([0, 1, 2, 9]) if number < 150 else 0):
            tokens, tenant = rng.randint(1, 60), rng.choice([None, None, "a", "b"])
            arrived_s = now + rng.random() / 100
            engine.add(Request(now, tokens, Work(4 * tokens, 6, tenant), front=0), arrived_s)
            waiting.append(Waiting(str(engine.num_received), tokens, tenant, arrived_s=arrived_s))
            planner.arrive(tokens)
        now += rng.random() / 100
        if not waiting:
            continue
        step = planner.choose(waiting, len(waiting), calibration.max_requests, now)
        composites, seconds = engine.start(now)
        assert composites == step.composites
        tokens = sum(member.num_tokens for member in step.members)
        rows = sum(
            row_counts(max(m.num_tokens for m in group), rung.merge, Ends())
            for rung, group in composites
        )
        assert seconds == costs.seconds(tokens, rows)
        assert [request.tokens for request in engine.running] == [
            m.num_tokens for m in step.members
        ]
        waiting = [record for record in waiting if record not in step.members]
        assert engine.waiting == waiting
        used |= {str(rung) for rung, _ in composites}
        now += seconds
    assert used > {"alone", "mux:4"}


def test_command(tmp_path: Path) -> None:
    calibration, report, picture = (tmp_path / name for name in ("c.json", "r.json", "p.png"))
    calibration.write_text(json.dumps(asdict(Calibration(rungs=("mux:2", "merge:2")))))
    words = ["--replicas", "1,3", "--seconds", "30", "--load", "0.3"]
    words += ["--calibrate", str(calibration), "--output", str(report), "--plot", str(picture)]
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["points"]
    assert points == json.loads(report.read_text())["points"]
    assert [point["replicas"] for point in points] == [1, 1, 1, 3, 3, 3]
    assert picture.stat().st_size > 10_000
    calibration.write_text('{"layers": 12}')
    wrong_number = tmp_path / "wrong.json"
    wrong_number.write_text(json.dumps(asdict(Calibration()) | {"prefill_layers": 0}))
    for wrong, message in (
        (["--calibrate", str(calibration)], "expected the keys layers, max_requests"),
        (["--calibrate", str(wrong_number)], "prefill_layers: expected at least 1, found 0"),
        (["--replicas", "1,none"], "expected positive integers, found 'none'"),
        (["--routers", "random"], "expected some of pack-aware"),
        (["--plot", "x.txt"], "expected a file ending in"),
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())
