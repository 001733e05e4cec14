"""A soak over HTTP: mixed traffic above what the server can do, and nothing may go wrong.

The offered load is open: requests come when they are due, in bursts and lulls, whether or not the
server keeps up. Its mean is 1.5 times *plain capacity*, what the server answers a moment before
with every request alone on the backbone. The model is just large enough for one core to be the
limit of that, so composites have to carry the rest. HTTP, tokenizing and the client share the other
core; where they are the limit, arrivals above ``MAX_IN_FLIGHT`` are shed and counted, and what was
achieved is told beside what was offered.

Memory is the server's processes' together, fitted by a line after a quarter of the time. At 100
requests a second ``MAX_GROWTH_MIB`` is 9 KiB a request in one minute and 300 bytes in thirty.
Without a leak the line gained -3 MiB in two minutes and 8 in thirty (175,000 answers).

One minute in the suite; by hand ``-s --soak-minutes 30``, and ``--soak-report FILE`` for JSON.
"""

import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch
from known_answers import Known, make_transparent_checkpoint
from prometheus_client.parser import text_string_to_metric_families
from soak_load import MAX_IN_FLIGHT, Load

from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import parse_rung_counts

# The default policy packs what one core cannot answer alone. A GPU can; so there, pairs at least.
SERVER_OPTIONS = {"min_agreement": 0} | ({"min_width": 2} if torch.cuda.is_available() else {})
SERVER_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
    # A client that falls behind must not meet connections that the server has given up on.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    # Two hundred MiB and more that come in the first 10,000 requests and look like a leak: oneDNN
    # keeps a kernel for every number of rows that a step had, 1024 of them by default, and malloc
    # keeps steps' tensors on its heap, in pieces, unless its threshold for mmap is fixed.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
OVERLOAD = 1.5
NUM_TEXTS = 500
NUM_PROBES = 20
BURST_CONNECTIONS = 128
REQUEST_TIMEOUT_S = 300.0
SETTLE_S = 10.0
PACKED_ANSWER = 1e-3  # a hundred times what rounding may do

WARM_UP = 0.25
MAX_GROWTH_MIB = 40.0


async def watch_memory(until: float) -> list[tuple[float, float]]:
    """Time and resident MiB every second; all children of this process are the server's."""
    sizes = []
    while time.monotonic() < until:
        children = psutil.Process().children(recursive=True)
        num_bytes = sum(child.memory_info().rss for child in children)
        sizes.append((time.monotonic(), num_bytes / 2**20))
        await asyncio.sleep(1)
    return sizes


def memory_growth(sizes: list[tuple[float, float]]) -> float:
    """MiB that the fitted line gains after the ``WARM_UP``, a share of the time."""
    start, end = sizes[0][0], sizes[-1][0]
    warm = [(t, size) for t, size in sizes if t >= start + WARM_UP * (end - start)]
    slope, _ = statistics.linear_regression(*zip(*warm, strict=True))
    return slope * (1 - WARM_UP) * (end - start)


async def read_metrics(session: aiohttp.ClientSession) -> tuple[Counter[str], float]:
    """Requests by rung since the server started; requests that it still holds."""
    async with session.get("/metrics") as response:
        text = await response.text()
    held = sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting")
    )
    return parse_rung_counts(text), held


async def settle(session: aiohttp.ClientSession, num_answers: int) -> tuple[Counter[str], float]:
    """``read_metrics`` once nothing is held and all answers are counted, or after ``SETTLE_S``."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        counts, held = await read_metrics(session)
        if time.monotonic() > deadline or (counts.total() >= num_answers and not held):
            return counts, held
        await asyncio.sleep(0.2)


async def soak(server: LocalServer, known: Known, seconds: float) -> dict[str, Any]:
    """Load the server for so long; what was seen, by name."""
    async with aiohttp.ClientSession(
        server.base_url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    ) as session:
        idle = Load(session, known)
        # First as many as will ever be under way: their memory is there before it is watched.
        await idle.burst(MAX_IN_FLIGHT, MAX_IN_FLIGHT, None)
        capacity = await idle.burst(NUM_TEXTS, BURST_CONNECTIONS, "exact")
        before, _ = await settle(session, idle.tally.answers)

        load = Load(session, known)
        started = time.monotonic()
        until = started + seconds
        sizes, *_ = await asyncio.gather(
            watch_memory(until),
            load.offer(OVERLOAD * capacity, seconds),
            *(load.probe(index, until) for index in range(NUM_PROBES)),
        )
        lasted = time.monotonic() - started
        counts, held = await settle(session, idle.tally.answers + load.tally.answers)
        async with session.get("/health") as response:
            health = response.status
    tally = load.tally
    percentiles = statistics.quantiles(tally.latencies_s, n=100)
    return {
        "minutes": seconds / 60,
        "plain capacity, requests/s": capacity,
        "offered, requests/s": tally.arrivals / seconds,
        "answered, requests/s": tally.ended["answered"] / lasted,
        "arrivals": tally.arrivals,
        "shed": tally.shed,
        "sent": dict(tally.sent),
        "ended": dict(tally.ended),
        "statuses": dict(tally.statuses),
        "answers": tally.answers,
        "latency p50, s": percentiles[49],
        "latency p99, s": percentiles[98],
        "client behind at most, s": tally.lag_s,
        "rungs": dict(counts - before),
        "held at the end": held,
        "health": health,
        "memory, MiB": statistics.fmean(size for _, size in sizes),
        "memory growth, MiB": memory_growth(sizes),
        "problems": idle.tally.problems + tally.problems,
        "memory by second": sizes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transparent_checkpoint(tmp_path_factory.mktemp("soak"), 512, 6)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    options = ("--additional-config", json.dumps({"revmux": SERVER_OPTIONS}))
    extra = ("--served-model-name", "known", "--enforce-eager", "--dtype", "float32", *options)
    with LocalServer(str(folder), extra_args=extra, env=os.environ | SERVER_ENV) as running:
        running.wait_ready(600)
        yield running


@pytest.mark.timeout(0)  # it lasts as long as it is told to; every request has a limit of its own
def test_soak(server: LocalServer, folder: Path, request: pytest.FixtureRequest) -> None:
    known = Known(folder, NUM_TEXTS, prefixed=0.5)
    for width in (2, 4):
        apart = (known.probabilities[width] - known.probabilities[1]).abs().amax(-1)
        assert apart.min() > PACKED_ANSWER, "a probe's answer no longer tells that it was packed"

    minutes: float = request.config.getoption("--soak-minutes")
    report: Path | None = request.config.getoption("--soak-report")
    seen = asyncio.run(soak(server, known, 60 * minutes))
    if report is not None:
        report.write_text(json.dumps(seen, indent=1))
    del seen["memory by second"]
    print("", *(f"{name:27} {str(value)[:500]}" for name, value in seen.items()), sep="\n")

    assert seen["problems"] == []
    sent, ended = seen["sent"], seen["ended"]
    assert sum(sent.values()) == sum(ended.values())
    assert sum(sent.values()) == seen["arrivals"] - seen["shed"] + sent["probe"]
    assert seen["health"] == 200
    assert seen["held at the end"] == 0
    rungs, answers = seen["rungs"], seen["answers"]
    assert answers <= sum(rungs.values()) <= answers + ended["aborted"]
    assert rungs["alone"] > 0
    assert sum(rungs.values()) > rungs["alone"], "no composites: nothing was tested"
    assert seen["memory growth, MiB"] < MAX_GROWTH_MIB
