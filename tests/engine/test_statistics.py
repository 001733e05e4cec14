"""Statistics: of RevMUX models whatever the number of API servers, of others only as vLLM would."""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import httpx
import pytest
from conftest import make_tiny_checkpoint, save_backbone
from prometheus_client import REGISTRY, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import STAT_LOGGER_PLUGINS_GROUP
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories
from vllm.v1.metrics.stats import SchedulerStats

from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.engine import metrics, stat_logger_entry
from revmux_vllm.engine.metrics import RevMuxStatLogger

OPTIONS = ("--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20))
NUM_REQUESTS, WORDS = 300, 5
LINE = re.compile(r"RevMUX: \d+ requests")


def start(model: Path, *more: str, **environment: str) -> LocalServer:
    env = os.environ | {"VLLM_LOG_STATS_INTERVAL": "1", "VLLM_LOGGING_LEVEL": "INFO"} | environment
    extra = ("--served-model-name", "known", *OPTIONS, *more)
    return LocalServer(str(model), extra_args=extra, env=env)


def ask(server: LocalServer, count: int) -> None:
    """``count`` texts of ``WORDS`` tokens at once, a connection each."""

    async def one(session: aiohttp.ClientSession) -> None:
        body = {"model": "known", "input": " ".join(["w5"] * WORDS)}
        async with session.post("/classify", json=body) as response:
            assert response.status == 200, await response.text()

    async def all_at_once() -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(server.base_url, connector=connector) as session:
            await asyncio.gather(*(one(session) for _ in range(count)))

    asyncio.run(all_at_once())


def read(server: LocalServer, is_settled: Callable[[dict[str, Metric]], bool]) -> Any:
    """The families of ``/metrics`` once ``is_settled``, or after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        page = httpx.get(f"{server.base_url}/metrics", timeout=30).text
        found = {family.name: family for family in text_string_to_metric_families(page)}
        if is_settled(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def total(found: dict[str, Metric], name: str) -> float:
    family = found.get(name)
    return sum(s.value for s in family.samples if s.name.endswith("_total")) if family else 0


def log(server: LocalServer) -> str:
    return server.log_path.read_text(encoding="utf-8", errors="replace")


def test_the_package_itself_declares_no_stat_logger() -> None:
    """Else vLLM collects statistics of every model, also under ``--disable-log-stats``."""
    code = f"""
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
import revmux_vllm.engine.stat_logger_entry as entry
def found(): return [each.value for each in entry_points(group={STAT_LOGGER_PLUGINS_GROUP!r})]
print(found())
entry.offer_stat_logger()
entry.offer_stat_logger()
print(found(), version(entry._NAME) == version("revmux-vllm"), distribution(entry._NAME).files)
try: distribution("not-installed-anywhere")
except PackageNotFoundError: print("not found")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "[]",
        "['revmux_vllm.engine.metrics:RevMuxStatLogger'] True None",
        "not found",
    ], done.stderr


def test_vllm_finds_the_stat_logger_that_is_offered() -> None:
    assert stat_logger_entry.GROUP == STAT_LOGGER_PLUGINS_GROUP
    stat_logger_entry.offer_stat_logger()
    assert load_stat_logger_plugin_factories() == [RevMuxStatLogger]


def test_the_hook_offers_it(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [each for each in sys.meta_path if not isinstance(each, stat_logger_entry._Finder)]
    monkeypatch.setattr(sys, "meta_path", others)
    EngineArgs(model=str(tiny_checkpoint), dtype="float32").create_engine_config()
    assert any(isinstance(each, stat_logger_entry._Finder) for each in sys.meta_path)


def make_stat_logger(model: Path, servers: int, engine: int = 0) -> RevMuxStatLogger:
    arguments = EngineArgs(model=str(model), dtype="float32", _api_process_count=servers)
    return RevMuxStatLogger(arguments.create_engine_config(), engine)


@pytest.mark.parametrize(("servers", "lines"), [(1, 1), (2, 0)])
def test_one_of_several_api_servers_says_nothing_of_its_share(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, servers: int, lines: int
) -> None:
    stat_logger = make_stat_logger(tiny_checkpoint, servers)
    said: list[Any] = []
    monkeypatch.setattr(metrics.logger, "info", lambda *line: said.append(line))
    stat_logger.since_log["requests", "alone"] += 3
    stat_logger.log()
    assert len(said) == lines


@pytest.mark.parametrize(("servers", "at_start"), [(1, 0.0), (2, None)])
def test_there_is_no_zero_that_is_not_known(
    tiny_checkpoint: Path, servers: int, at_start: float | None
) -> None:
    """An engine of several API servers sends no statistics under ``--disable-log-stats``."""
    stat_logger = make_stat_logger(tiny_checkpoint, servers, engine=70 + servers)

    def shown() -> float | None:
        return REGISTRY.get_sample_value("revmux:arrived_tokens_total", stat_logger.labels)

    assert shown() == at_start
    stat_logger.record(None, None)
    assert shown() == at_start
    stat_logger.record(SchedulerStats(), None)
    assert shown() == 0


def test_another_model_of_the_same_process_has_no_metrics(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    make_stat_logger(tiny_checkpoint, 1)
    save_backbone("llama", tmp_path)
    others = make_stat_logger(tmp_path, 1)
    others.record(SchedulerStats(), None)
    assert REGISTRY.get_sample_value("revmux:arrived_tokens_total", others.labels) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("statistics"))


class Answered(NamedTuple):
    """A server that has answered ``NUM_REQUESTS``: its metrics, and the folder of each share."""

    server: LocalServer
    found: dict[str, Metric]
    shares: Path


@pytest.fixture(scope="module")
def two_api_servers(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Answered]:
    shares = tmp_path_factory.mktemp("shares")
    policy = ("--additional-config", '{"revmux": {"policy": "fixed:4"}}')
    more = ("--api-server-count", "2", *policy)
    with start(checkpoint, *more, PROMETHEUS_MULTIPROC_DIR=str(shares)) as server:
        server.wait_ready(300)
        ask(server, NUM_REQUESTS)
        found = read(server, lambda m: total(m, "revmux:requests") >= NUM_REQUESTS)
        yield Answered(server, found, shares)


@pytest.mark.slow
def test_two_api_servers_count_every_request_once(two_api_servers: Answered) -> None:
    found, files = two_api_servers.found, two_api_servers.shares.glob("counter_*.db")
    pages = [MultiProcessCollector.merge([str(path)]) for path in files]
    shares = [total({each.name: each for each in page}, "revmux:requests") for page in pages]
    assert sum(share > 0 for share in shares) == 2, f"one had nothing to do: {shares}"
    assert sum(shares) == NUM_REQUESTS
    assert total(found, "vllm:request_success") == NUM_REQUESTS
    assert total(found, "revmux:requests") == NUM_REQUESTS
    assert total(found, "revmux:arrived_tokens") == NUM_REQUESTS * WORDS
    rungs = {s.labels["rung"]: s.value for s in found["revmux:requests"].samples}
    composites = {s.labels["rung"]: s.value for s in found["revmux:composites"].samples}
    assert 0 < 4 * composites["mux:4"] == rungs["mux:4"]


@pytest.mark.slow
def test_two_api_servers_show_one_series_of_each_gauge(two_api_servers: Answered) -> None:
    expected = ["in_use known 0", "known 0", "widest known 0"]
    assert series_of_gauges(two_api_servers.found) == expected


def series_of_gauges(found: dict[str, Metric]) -> list[str]:
    """The labels of every series of ours, without their names."""
    mine = [f for f in found.values() if f.type == "gauge" and f.name.startswith("revmux:")]
    labels = [s.labels for family in mine for s in family.samples]
    names = ("at", "model_name", "engine")
    others = {name for each in labels for name in each} - set(names)
    assert not others, f"of a process: {others}"
    return sorted(" ".join(each[name] for name in names if name in each) for each in labels)


@pytest.mark.slow
def test_two_api_servers_log_no_shares(two_api_servers: Answered) -> None:
    server = two_api_servers.server
    ask(server, 50)
    time.sleep(3)
    assert not LINE.search(log(server))
    assert "disabling stats logging to avoid incomplete stats" in log(server), "so does vLLM"


@pytest.mark.slow
def test_log_stats_of_another_model_stay_off(tmp_path: Path) -> None:
    """No word of our stat logger, no statistics collected, as where RevMUX is not installed."""
    save_backbone("llama", tmp_path / "plain")
    with start(tmp_path / "plain", "--disable-log-stats") as server:
        server.wait_ready(300)
        ask(server, 20)
        time.sleep(2)
        found = read(server, lambda _: True)
        assert [name for name in found if name.startswith(("vllm:", "revmux:"))] == []
        assert "http_requests" in found, "the page itself is there"
        assert not re.search("custom stat loggers|stat_logger_plugins|throughput", log(server))


@pytest.mark.slow
def test_without_log_stats_there_are_metrics_and_no_lines(checkpoint: Path) -> None:
    with start(checkpoint, "--disable-log-stats") as server:
        server.wait_ready(300)
        ask(server, 20)
        time.sleep(3)
        found = read(server, lambda m: total(m, "revmux:requests") >= 20)
        assert total(found, "revmux:requests") == 20
        assert not LINE.search(log(server))
        assert "enabling logging without default stat loggers" in log(server), "vLLM says it"
