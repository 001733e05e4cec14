"""``revmux bench`` without an engine: what is concluded, shown and refused."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import revmux
from rich.console import Console
from rich.progress import Progress

from revmux_vllm import errors
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.offline import measure, summary
from revmux_vllm.bench.plot import plot_load
from revmux_vllm.bench.summary import in_words, summarise
from revmux_vllm.bench.tables import points_table, rungs_table, times_table
from revmux_vllm.config import layer_limit
from revmux_vllm.rungs import Rung


def side(achieved: float, p99_ms: float | None, **more: Any) -> dict[str, Any]:
    times = {"queue_ms": 1.0, "inference_ms": 5000.0, "rest_ms": 3.0, "front_end_cpu": 0.5}
    counts = {"alone": 1, "mux:4": 3}
    p50_ms = p99_ms and p99_ms / 2
    return {
        "achieved": achieved,
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "errors": 0,
        "limit": "engine",
        "requests_by_rung": counts,
        **times,
        **more,
    }


def make_report(*points: dict[str, Any]) -> dict[str, Any]:
    numbered = [{"load": point["offered"] / 100, "layer_limit": 2.29, **point} for point in points]
    return {
        "model": "m",
        "arrivals": "poisson",
        "lengths": "texts",
        "seconds": 10,
        "plain_capacity": 100.0,
        "points": numbered,
        "sustained": summarise(numbered, 2000),
    }


REPORT = make_report(
    {"offered": 50.0, "revmux": side(50, 90), "plain": side(50, 80)},
    {"offered": 100.0, "revmux": side(99, 100), "plain": side(96, 1900)},
    {"offered": 150.0, "revmux": side(149, 200), "plain": side(110, 1500)},
    {"offered": 200.0, "revmux": side(195, 2100), "plain": side(110, 9000, limit=None)},
)


def test_sustained_needs_the_tail_and_the_throughput() -> None:
    found = REPORT["sustained"]
    # Plain is in time at 150, but answers 110; revmux keeps up at 200, but late.
    assert (found["revmux"], found["plain"]) == (150.0, 100.0)
    assert found["ratio"] == 1.5
    assert found["at_least"] == []
    words = "\n".join(in_words(REPORT))
    assert "ratio 1.50; layer limit of what ran at 2x 2.29" in words
    assert "The limit at 2x: revmux engine, plain unknown." in words


def test_sustained_says_when_more_might_be_and_when_nothing_is() -> None:
    point = {"offered": 50.0, "revmux": side(50, 90), "plain": side(0, None)}
    report = make_report(point)
    assert report["sustained"] | {"slo_ms": 0} == {
        "slo_ms": 0,
        "revmux": 50.0,
        "plain": None,
        "ratio": None,
        "at_least": ["revmux"],
    }
    words = "\n".join(in_words(report))
    assert "revmux sustained at least 50.0 requests/s" in words
    assert "plain sustained none" in words


def test_a_machine_that_changed_is_told() -> None:
    steady = make_report({"offered": 200.0, "revmux": side(9, 9), "plain": side(114, 9)})
    changed = make_report({"offered": 200.0, "revmux": side(9, 9), "plain": side(120, 9)})
    assert "measure again" not in "\n".join(in_words(steady))
    assert "answered 120.0 requests/s, more than the 100.0" in "\n".join(in_words(changed))


def test_tables_fit_a_terminal() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in (points_table, times_table, rungs_table):
        console.print(table(REPORT))
    shown = console.export_text()
    assert "…" not in shown
    assert "9,000" in shown
    assert "25" in shown.split("Requests by rung")[1]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_made(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "figures" / f"load.{suffix}"
    nothing = {"offered": 250.0, "revmux": side(1, None, requests_by_rung={})}
    report = make_report(*REPORT["points"], nothing | {"plain": side(1, 9), "layer_limit": None})
    plot_load(report, path)
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in start or b"xml" in start


class Rated:
    """Answers at a rate that the round decides."""

    def __init__(self, rates: list[float], calls: list[str], name: str) -> None:
        self.rates, self.calls, self.name = iter(rates), calls, name

    def rate(self, prompts: list[list[int]]) -> float:
        self.calls.append(self.name)
        return next(self.rates)


def test_offline_rounds_alternate_and_ratios_are_per_round() -> None:
    calls: list[str] = []
    ours, plain = Rated([9, 2, 6, 8], calls, "ours"), Rated([9, 1, 2, 4], calls, "plain")
    with Progress(disable=True) as progress:
        rates = measure({"ours": ours.rate, "plain": plain.rate}, [[1]], 3, progress)
    assert calls == ["plain", "ours", "ours", "plain"] * 2
    row = summary(rates["ours"], rates["plain"], layer_limit(Rung(mux=2), 3, 12))
    assert row["ratios"] == [2, 3, 2]
    assert (row["ratio"], row["ratio_max"], row["requests_per_s"]) == (2, 3, 6)
    assert row["layer_limit"] == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--loads 0,1", "--loads 0,1: expected multiples above 0"),
        ("--loads 1,x", "--loads 1,x: expected numbers"),
        ("--arrivals uniform", "--arrivals uniform: expected poisson or bursty"),
        ("--seconds 0", "--seconds 0: expected a number above 0"),
        ("--slo-ms -1", "--slo-ms -1: expected a number above 0"),
        ("--lengths fixed:0", "--lengths fixed:0: expected texts, fixed:N"),
        ("--lengths fixed:513", "expected 1 to 512 tokens"),
        ("--lengths fixed:65 --server-args --max-model-len=64", "expected 1 to 64 tokens"),
        ("--lengths fixed:5 --texts x", "--texts x: --lengths fixed:5 makes its own"),
        ("--texts /nowhere/x", "--texts /nowhere/x: no such file"),
        ("--additional-config {", "--additional-config {: not JSON"),
        ("--additional-config [1]", "expected a JSON object"),
        ('--additional-config {"revmux":{"rung":[]}}', "revmux: unknown key rung; known are"),
        ("--server-args --port=1", "--server-args --port: set by the benchmark itself"),
        ("--plot load.pdx", "--plot load.pdx: expected a file ending in .png"),
    ],
)
def test_mistakes_are_told_before_a_server_starts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.setattr(LocalServer, "__enter__", lambda self: pytest.fail("started"))
    result = revmux(f"bench online {tiny_checkpoint} {options}")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["online", "offline"])
def test_a_model_that_is_none_is_refused(tmp_path: Path, command: str) -> None:
    result = revmux(f"bench {command} nobody")
    assert result.exit_code == 2
    assert "nobody: no such folder; bundled are revmux-llama" in result.output
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = revmux(f"bench {command} {tmp_path}")
    assert "--load-format" not in result.output
    assert "revmux: missing; is this a plain backbone?" in result.output


def test_offline_knows_the_checkpoint_s_rungs(tiny_checkpoint: Path) -> None:
    result = revmux(f"bench offline {tiny_checkpoint} --rungs mux:2,merge:2")
    assert result.exit_code == 2
    assert "--rungs: the checkpoint has no merge:2; it has mux:2, mux:4, mux:8" in result.output


@pytest.mark.parametrize(
    ("missing", "cure"),
    [
        ("vllm", "tools/install.sh installs vLLM"),
        ("httpx", "pip install -e '.[bench]'"),
        ("pandas", "pip install -e '.[bench]'"),
        ("matplotlib", "pip install -e '.[bench]'"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, cure: str
) -> None:
    found: Callable[[str], Any] = lambda name: None if name == missing else SimpleNamespace()  # noqa: E731
    monkeypatch.setattr(errors, "find_spec", found)
    result = revmux("bench online revmux-llama --plot load.png")
    assert result.exit_code == 2
    assert f"{missing} is not installed" in result.output
    assert cure in result.output


def test_help_needs_no_vllm() -> None:
    code = "import sys, revmux_vllm.cli; print([m for m in ('vllm', 'httpx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
