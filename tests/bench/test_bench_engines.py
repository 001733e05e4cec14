"""``revmux bench`` from start to finish, on a tiny checkpoint whose numbers mean nothing."""

import json
import os
from pathlib import Path

import pytest
from click.testing import Result
from conftest import revmux

SIDE = {
    "duration_s",
    "achieved",
    "errors",
    "mean_tokens",
    "mean_ms",
    "p50_ms",
    "p99_ms",
    "queue_ms",
    "inference_ms",
    "server_ms",
    "rest_ms",
    "limit",
    "front_end_cpu",
    "requests_by_rung",
}


# Two engines or servers each, and clients that take long to start.
pytestmark = pytest.mark.slow


def object_on_stdout(result: Result, output: Path) -> dict:
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads(output.read_text()) == report
    return report


def test_online(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "load.json", tmp_path / "load.png"
    result = revmux(
        f"bench online {tiny_checkpoint} --loads 0.5 --seconds 2 --arrivals bursty "
        "--lengths fixed:12 --server-args --enforce-eager --json "
        f"--output {output} --plot {plot} --slo-ms 60000"
    )
    report = object_on_stdout(result, output)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (report["lengths"], report["arrivals"]) == ("fixed:12", "bursty")
    (point,) = report["points"]
    assert point["offered"] == pytest.approx(report["plain_capacity"] / 2)
    for name in ("revmux", "plain"):
        side = point[name]
        assert set(side) == SIDE
        assert side["errors"] == 0
        assert side["mean_tokens"] == 12
        assert 0 < side["p50_ms"] <= side["p99_ms"]
        assert 0 < side["inference_ms"] < side["server_ms"] < side["mean_ms"]
        assert side["limit"] in ("engine", "front end")
        assert 0 < side["front_end_cpu"] < 2
    requests = max(1, round(2 * point["offered"]))
    assert sum(point["revmux"]["requests_by_rung"].values()) == requests
    assert point["plain"]["requests_by_rung"] == {}
    assert 1 <= point["layer_limit"] < 4
    assert report["sustained"]["slo_ms"] == 60000


def test_offline(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    result = revmux(
        f"bench offline {tiny_checkpoint} --rungs mux:2,mux:4 --requests 16 --lengths fixed:12 "
        f"--enforce-eager --json --output {output}"
    )
    report = object_on_stdout(result, output)
    assert (report["requests"], report["mean_tokens"], report["rounds"]) == (16, 12, 5)
    assert [row["rung"] for row in report["configurations"]] == [
        "alone",
        "mux:2",
        "mux:4",
        "load",
    ]
    for row in report["configurations"]:
        assert len(row["ratios"]) == 5
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert report["configurations"][2]["layer_limit"] == pytest.approx(1 / (1 / 4 + 3 / 16))
    assert report["baseline"] == "plain vLLM"
    # Of the engine in this process; what is started next must not inherit it.
    assert not {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_STREAM"} & set(os.environ)
