"""The GPU kit without a GPU: its pure pieces, its children; slow: all of it, tiny."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import gpu.kit
import pytest
import torch
import typer
from gpu import bench, command, parity, sync
from gpu.checks import judge_choices, judge_device, judge_imports, judge_plugin
from gpu.child import Child, ChildError, run_in_child
from gpu.engines import run_evenly
from gpu.report import latency_rows, markdown, throughput_rows
from gpu.results import FAIL, NUMBER, PASS, SKIPPED, Outcome, Results, Skipped
from gpu.settings import STAGES, Settings
from gpu.shapes import RUNGS, SHAPES, Shape, revmux_config
from gpu.tiny import ALL_RUNGS
from transformers import AutoConfig, AutoModelForSequenceClassification
from typer.testing import CliRunner

from revmux_vllm import checkpoint
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.bench.offline import summary
from revmux_vllm.config import layer_limit
from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Rung

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9


def on_meta(shape: Shape) -> tuple[int, int]:
    """Parameters of a shape's backbone and of its adapters."""
    values = dict(shape.config)
    with torch.device("meta"):
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        backbone: Any = AutoModelForSequenceClassification.from_config(config)
        ladder = AdapterLadder(revmux_config(shape, RUNGS), shape.hidden_size)
    counts = [sum(p.numel() for p in module.parameters()) for module in (backbone, ladder)]
    return counts[0], counts[1]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_parameters_that_they_claim(name: str) -> None:
    shape = SHAPES[name]
    backbone, adapters = on_meta(shape)
    assert backbone == shape.parameters
    # Both engines in their share of 80 GB: bfloat16 weights, float32 adapters, a third to spare.
    assert 2 * backbone + 4 * adapters < 2 / 3 * Settings.memory_share * 80 * GB
    assert all(shape.requests(length) >= 16 for length in (1, 40, 4096))


def test_a_shape_is_a_checkpoint_without_weights(tmp_path: Path) -> None:
    from gpu.shapes import write_shape

    write_shape(tmp_path / "it", SHAPES["1b"], RUNGS)
    config, values = checkpoint.read_config(tmp_path / "it")
    assert config.rungs == RUNGS
    config.check_backbone(*checkpoint.backbone_shape(values))


def test_the_two_calls_of_the_help_are_planned_to_fit_ten_minutes() -> None:
    for stages, shapes in ((STAGES, ("0.1b",)), (("throughput", "latency"), ("1b", "8b"))):
        settings = Settings(stages=stages, shapes=shapes)
        planned = settings.planned_s(settings.shapes_on(is_gpu=True))
        assert tuple(planned) == stages
        assert sum(planned.values()) < 600
    alone = Settings(stages=("latency",), shapes=("8b",))
    assert alone.planned_s([SHAPES["8b"]])["latency"] > SHAPES["8b"].start_s


def test_default_shapes_are_those_of_the_device() -> None:
    assert [shape.name for shape in Settings().shapes_on(True)] == ["0.1b", "1b", "8b"]
    assert [shape.name for shape in Settings().shapes_on(False)] == ["tiny"]
    assert Settings(lengths=(7, 9)).latency_length() == 7
    assert Settings().latency_length() == 128


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stages": ("check", "speed")}, "stages: expected some of check, parity"),
        ({"shapes": ("70b",)}, "shapes: expected some of tiny, 0.1b"),
        ({"rungs": (Rung(mux=16),)}, "rungs"),
        ({"lengths": (0,)}, "lengths"),
        ({"memory_share": 0.9}, "memory_share: expected above 0 and at most 0.48"),
    ],
)
def test_mistakes_are_told_by_option(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**wrong)


def test_an_item_that_fails_stops_no_other() -> None:
    seen: list[str] = []
    results = Results(lambda item: seen.append(item.status))

    def breaks() -> Outcome:
        raise ChildError("start: it broke\nand more")

    def cannot() -> Outcome:
        raise Skipped("no GPU")

    assert results.attempt("parity", "one", breaks) is None
    assert results.attempt("sync", "two", cannot) is None
    seven = Outcome(NUMBER, "7", {"x": 7})
    assert results.attempt("throughput", "three", lambda: seven) == {"x": 7}
    assert seen == [FAIL, SKIPPED, NUMBER]
    assert [item.says for item in results.items] == ["ChildError: start: it broke", "no GPU", "7"]
    assert "and more" in results.items[0].details["traceback"]
    assert [item.name for item in results.failed] == ["one"]


def test_nothing_starts_when_the_time_is_over() -> None:
    now = [0.0]
    results = Results(minutes=2, clock=lambda: now[0])
    assert results.left_s(600) == 120
    assert results.attempt("check", "one", lambda: Outcome(PASS, "")) == {}

    def hangs() -> Outcome:
        now[0] = 121
        raise ChildError("run: no answer in 119 s\nits log")

    assert results.attempt("check", "cut", hangs) is None
    says = "cut when the time was over: run: no answer in 119 s"
    assert (results.items[-1].status, results.items[-1].says) == (SKIPPED, says)
    assert results.left_s(600) == 0
    assert results.attempt("check", "two", lambda: Outcome(PASS, "")) is None
    assert results.items[-1].says == "no time left"


def test_a_child_answers_and_its_failures_are_told(tmp_path: Path) -> None:
    child = Child(dict, {"a": 1}, log=tmp_path / "log")
    assert child.call("get", "a") == 1
    with pytest.raises(ChildError, match="pop: KeyError: 'b'") as failed:
        child.call("pop", "b")
    assert "Traceback" in str(failed.value), "the log's end is in the message"
    assert child.call("get", "a") == 1, "and it goes on"
    child.close()
    with pytest.raises(ChildError, match="the process had ended"):
        child.call("get", "a")


def test_a_child_that_crashes_or_hangs_is_told(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="run: the process ended with status 3"):
        run_in_child(os._exit, 3, log=tmp_path / "crashed")
    began = time.monotonic()
    with pytest.raises(ChildError, match="run: no answer in 0 s"):
        run_in_child(time.sleep, 60, log=tmp_path / "hung", timeout_s=0.4)
    assert time.monotonic() - began < 30


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    """Also where the child itself is ended by force."""
    started = tmp_path / "started"
    words = ["sh", "-c", f"sleep 60 & echo $! > {started}; wait"]
    with pytest.raises(ChildError, match="no answer"):
        run_in_child(subprocess.run, words, log=tmp_path / "log", timeout_s=5)
    status = Path(f"/proc/{started.read_text().strip()}/status")
    end = time.monotonic() + 5
    while status.exists() and "(zombie)" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    assert not status.exists() or "(zombie)" in status.read_text()


def test_a_child_has_its_own_variables(tmp_path: Path) -> None:
    environ = {sync.VARIABLE: "error"}
    assert run_in_child(os.getenv, sync.VARIABLE, log=tmp_path / "log", environ=environ) == "error"
    assert sync.VARIABLE not in os.environ


def test_latency_counts_from_when_a_request_was_due() -> None:
    """Three requests 1 s apart, steps of 2.5 s that answer all that waits."""
    now, waiting, slept = [0.0], list[int](), list[float]()

    def step() -> list[int]:
        now[0] += 2.5
        done = list(waiting)
        waiting.clear()
        return done

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    found = run_evenly(waiting.append, step, 3, 1.0, lambda: now[0], sleep)
    assert found == [2.5, 4.0, 3.0]  # the second and third are due while the first runs
    assert slept == []
    now[0] = 10.0
    assert run_evenly(waiting.append, step, 2, 4.0, lambda: now[0], sleep) == [2.5, 2.5]
    assert slept == [1.5]


def compared(most: float = 1e-6, **other: Any) -> dict[str, Any]:
    cases = {case: {"most": most, "mean": most / 10, "if_alone": 0.2} for case in parity.CASES}
    rungs = ["alone", *map(str, ALL_RUNGS)]
    return {
        "cases": cases,
        "rungs": rungs,
        "most_rungs_in_a_step": 3,
        "alone": 0.0,
        "attention": ["A"],
    } | other


def test_parity_is_judged() -> None:
    tolerance = parity.TOLERANCES["cpu", "float32"]
    assert parity.judge(compared(), tolerance).status == PASS
    assert parity.judge(compared(1e-3), tolerance).status == FAIL
    nan = compared()
    nan["cases"][parity.CASES[1]]["most"] = float("nan")
    judged = parity.judge(nan, tolerance)
    assert judged.status == FAIL
    assert f"nan ({parity.CASES[1]})" in judged.says
    assert parity.judge(compared(rungs=["alone", "mux:2"]), tolerance).says.startswith("no batch")
    assert parity.judge(compared(most_rungs_in_a_step=2), tolerance).status == FAIL
    assert parity.judge_alone(compared(), tolerance).status == PASS
    assert parity.judge_alone(compared(alone=0.1), tolerance).status == FAIL
    # Wrong company differs by 0.1 and more on average: far from every tolerance.
    assert all(each.mean < 0.05 for each in parity.TOLERANCES.values())


RUNNER, LAYOUT = "/there/vllm/v1/worker/gpu/runner.py", "/there/revmux_vllm/engine/layout.py"
WARNED = f"""
(Worker pid=7) {RUNNER}:12: UserWarning: called a synchronizing CUDA operation (Triggered
(Worker pid=7) {LAYOUT}:34: UserWarning: Tensor.to: a non_blocking H2D copy that may be
(Worker pid=7) {LAYOUT}:34: UserWarning: Tensor.to: a non_blocking H2D copy that may be
(Worker pid=7) /there/vllm/other.py:5: FutureWarning: something else
"""


def test_places_that_wait_are_found_and_judged() -> None:
    found = sync.places(WARNED)
    ours, vllms = f"{LAYOUT}:34", f"{RUNNER}:12"
    assert found == [ours, vllms]
    assert sync.judge_places(found, "e") == Outcome(
        FAIL, f"waits at {ours}", {"places": found, "error": "e"}
    )
    assert sync.judge_places([vllms], "e").status == PASS
    assert sync.judge_places([], "run: out of memory\nmore").says.endswith("run: out of memory")


def test_checks_are_judged() -> None:
    versions = {"vllm": "0.32.0", "torch": "2.11.0+cu130", "vllm_build": "cuda"}
    right = judge_imports(versions | {"torch_wanted_by_vllm": "2.13.0"})
    assert (right.status, right.says.endswith("where vLLM wants 2.13.0")) == (PASS, True)
    other = judge_imports(versions | {"vllm": "0.33.0", "torch_wanted_by_vllm": None})
    assert other.status == FAIL
    cpu = {"is_gpu": False, "torch_sees_cuda": False, "platform": "CpuPlatform", "device": "it"}
    assert judge_device(cpu).status == PASS
    assert judge_device(cpu | {"torch_sees_cuda": True}).status == FAIL
    assert judge_plugin({"entry_point": True, "missing_architectures": []}).status == PASS
    assert judge_plugin({"entry_point": False, "missing_architectures": []}).status == FAIL
    choices = {"model_runner": "V2", "cudagraph_mode": "PIECEWISE", "c_compiler": None}
    assert judge_choices(choices, is_gpu=True).status == FAIL
    assert judge_choices(choices, is_gpu=False).status == NUMBER


def throughput_details(length: int) -> dict[str, Any]:
    row = summary([20.0, 24.0], [10.0, 10.0], layer_limit(Rung(mux=4), 8, 32)) | {"rung": "mux:4"}
    return {"shape": "8b", "length": length, "plain_requests_per_s": 10.0, "rows": [row]}


def latencies() -> Outcome:
    seconds = {"ours": [[0.02] * 9 + [0.04], [0.02] * 10], "plain": [[0.01] * 10, [0.02] * 10]}
    return bench.quarter_load("8b", 128, 2.5, seconds, {"alone": 15, "mux:2": 5})


def test_latencies_are_compared_by_visit() -> None:
    found = latencies().details
    assert (found["requests"], found["ours_p50_ms"], found["plain_p50_ms"]) == (20, 20, 15)
    assert found["p50_ratios"] == [2.0, 1.0]
    assert found["p50_ratio"] == pytest.approx(4 / 3)


def report() -> dict[str, Any]:
    results = Results()
    results.attempt("check", "imports", lambda: Outcome(PASS, "a | b"))
    results.attempt(
        "throughput", "8b, 128 tokens", lambda: Outcome(NUMBER, "fast", throughput_details(128))
    )
    results.skip("throughput", "8b, 512 tokens", "no time left")
    results.attempt("latency", "8b, 128 tokens", latencies)
    facts = {"date": "2027-01-02 03:04 UTC", "command": "python run.py", "device": "a card"}
    return facts | {
        "vllm": "0.32.0",
        "model_runner": "V2",
        "settings": {"rounds": 5},
        "items": results.as_list(),
    }


def test_tables_of_a_report() -> None:
    assert throughput_rows(report()) == [
        ["8b, 128", "plain vLLM", "10.0", "1", "", ""],
        ["", "mux:4", "22.0", "2.20 (2.00 to 2.40)", "2.29", "0.96"],
    ]
    assert latency_rows(report()) == [
        [
            *("8b, 128", "2.5", "20, 75", "20.0, 15.0", "21.0, 20.0", "36.2, 20.0"),
            *("1.33 (2.00, 1.00)", "1.81 (3.82, 1.00)"),
        ]
    ]
    text = markdown(json.loads(json.dumps(report())))
    assert "2027-01-02, a card; vllm 0.32.0, model runner V2. `python run.py`" in text
    assert "| check | imports | pass | a \\| b |" in text
    assert "|  | mux:4 | 22.0 | 2.20 (2.00 to 2.40) | 2.29 | 0.96 |" in text
    assert "Median of 5 rounds" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if "|" in line}
    assert widths == {5, 7, 9}


class StandInChecks:
    """In place of the child that checks: a CPU on which everything is found."""

    facts: ClassVar[dict[str, dict[str, Any]]] = {
        "imports": {
            "vllm": "0.32.0",
            "torch": "2.13.0",
            "vllm_build": "cpu",
            "torch_wanted_by_vllm": None,
        },
        "device": {"is_gpu": False, "torch_sees_cuda": False, "platform": "P", "device": "it"},
        "plugin": {"entry_point": True, "missing_architectures": []},
        "choices": {"model_runner": "V1", "cudagraph_mode": "NONE", "c_compiler": "cc"},
    }

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def call(self, name: str, **_: Any) -> dict[str, Any]:
        return self.facts[name]

    def close(self) -> None:
        pass


class StandInPair:
    """In place of two engines, which do not survive prompts of 40 tokens."""

    log: ClassVar[list[str]] = []

    def __init__(self, shape: Shape, *_: Any) -> None:
        self.log.append(f"start {shape.name}")

    def facts(self) -> dict[str, Any]:
        return {"plain": {}}

    def throughput(self, length: int, *_: Any) -> Outcome:
        if length == 40:
            raise ChildError("seconds: the process ended with status -11")
        return Outcome(NUMBER, "fast", throughput_details(length))

    def latency(self, length: int, capacity: float, *_: Any) -> Outcome:
        self.log.append(f"latency at {capacity:g}")
        return latencies()

    def close(self) -> None:
        self.log.append("close")


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command with stand-ins for all that starts an engine."""

    def compare(function: Any, family: str, *_: Any, **__: Any) -> dict[str, Any]:
        if family == "llama":
            raise ChildError("run: the process ended with status -6")
        return compared()

    def waits(*_: Any) -> Outcome:
        raise Skipped(sync.NO_GPU)

    monkeypatch.setattr(StandInPair, "log", [])
    monkeypatch.setattr(gpu.kit, "Child", StandInChecks)
    monkeypatch.setattr(gpu.kit, "run_in_child", compare)
    monkeypatch.setattr(sync, "check_ours", waits)
    monkeypatch.setattr(bench, "Pair", StandInPair)
    app = typer.Typer()
    app.command()(command.main)

    def run(words: str = "") -> tuple[Any, list[tuple[str, str, str]]]:
        done = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path / "out")])
        path = tmp_path / "out" / "report.json"
        items = json.loads(path.read_text())["items"] if path.exists() else []
        return done, [(item["stage"], item["name"], item["status"]) for item in items]

    return run


def test_a_failed_stage_keeps_going_and_fails_the_command(kit: Any, tmp_path: Path) -> None:
    done, items = kit(f"--lengths 40,128 --json {tmp_path / 'it.json'}")
    assert done.exit_code == 1, done.output
    found = {name: NUMBER if name == "choices" else PASS for name in StandInChecks.facts}
    assert items == [
        *(("check", name, status) for name, status in found.items()),
        *(("parity", f"llama, {dtype}{more}", status)
          for dtype in ("float32", "bfloat16")
          for more, status in (("", FAIL), (", alone", SKIPPED))),
        *(("parity", f"bert, {dtype}{more}", PASS)
          for dtype in ("float32", "bfloat16")
          for more in ("", ", alone")),
        ("sync", "RevMUX", SKIPPED),
        ("throughput", "tiny, 40 tokens", FAIL),
        ("throughput", "tiny, 128 tokens", NUMBER),
        ("latency", "tiny, 128 tokens", NUMBER),
    ]  # fmt: skip
    started_anew = ["start tiny", "close", "start tiny", "latency at 10", "close"]
    assert StandInPair.log == started_anew
    out = tmp_path / "out"
    assert (tmp_path / "it.json").read_text() == (out / "report.json").read_text()
    assert "mux:4" in (out / "report.md").read_text()


def test_without_a_working_vllm_nothing_else_is_tried(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = {"plugin": {"entry_point": False, "missing_architectures": []}}
    monkeypatch.setattr(StandInChecks, "facts", StandInChecks.facts | plugin)
    done, items = kit()
    assert done.exit_code == 1
    assert [item for item in items if item[0] != "check"] == [
        (stage, "all", SKIPPED) for stage in ("parity", "sync", "throughput")
    ]
    assert StandInPair.log == []


def test_stages_split_the_kit(kit: Any) -> None:
    done, items = kit("--stages throughput --lengths 128")
    assert done.exit_code == 0, done.output
    assert [item[0] for item in items] == ["check"] * 4 + ["throughput"]
    done, items = kit("--stages throughput --shapes 70b")
    assert done.exit_code == 2
    assert "--shapes 70b: expected some of tiny, 0.1b, 1b, 8b" in " ".join(done.stderr.split())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a dozen engines start
def test_the_whole_kit_on_this_machine(tmp_path: Path) -> None:
    """As on a GPU, with tiny shapes, so that the first minute there goes to no typing error."""
    words = "--shapes tiny --enforce-eager --rounds 1 --lengths 20,30 --latency-seconds 0.5"
    run = [sys.executable, "benchmarks/gpu/run.py", *words.split(), "--out", str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    statuses = {(item["stage"], item["name"]): item["status"] for item in report["items"]}
    assert {stage for stage, _ in statuses} == set(STAGES)
    assert {key: status for key, status in statuses.items() if status == SKIPPED} == {
        ("sync", "RevMUX"): SKIPPED
    }
    (found,) = (item["details"] for item in report["items"] if item["name"] == "tiny, 30 tokens")
    assert [row["rung"] for row in found["rows"]] == ["alone", *map(str, RUNGS), "load"]
    assert report["engines_tiny"]["revmux"]["adapters_dtypes"]
    assert "Latency" in (tmp_path / "report.md").read_text()
