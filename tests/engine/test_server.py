"""The real server: every answer goes to the request that asked, whatever else happens."""

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import torch
from bursts import parse_rung_counts
from known_answers import Known, make_transparent_checkpoint
from word_tokenizers import VOCAB_SIZE

from revmux_vllm.bench.local_server import LocalServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transparent_checkpoint(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    options = ("--additional-config", '{"revmux": {"policy": "fixed:4"}}')
    extra = ("--served-model-name", "known", "--enforce-eager", "--dtype", "float32", *options)
    env = os.environ | {"VLLM_LOG_STATS_INTERVAL": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with LocalServer(str(folder), extra_args=extra, env=env) as running:
        running.wait_ready(300)
        yield running


def body(text: Any) -> dict[str, Any]:
    return {"model": "known", "input": text}


async def ask(session: aiohttp.ClientSession, text: str) -> str:
    async with session.post("/classify", json=body(text)) as response:
        assert response.status == 200, await response.text()
        return (await response.json())["data"][0]["label"]


async def ask_all(server: LocalServer, texts: list[str], *beside: Any) -> list[str]:
    """All texts at once, a connection each, with other coroutines running beside them."""
    async with aiohttp.ClientSession(
        server.base_url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=300),
    ) as session:
        answers, *_ = await asyncio.gather(
            asyncio.gather(*(ask(session, text) for text in texts)),
            *(run(session) for run in beside),
        )
    return answers


def wrong(known: Known, answers: list[str], indices: list[int]) -> list[int]:
    return [i for i, a in zip(indices, answers, strict=True) if a not in known.labels[i]]


def requests_by_rung(server: LocalServer) -> Counter[str]:
    return parse_rung_counts(httpx.get(f"{server.base_url}/metrics").text)


def test_each_of_2000_concurrent_requests_gets_its_own_answer(
    server: LocalServer, folder: Path
) -> None:
    known = Known(folder, 2000)
    distinct = {frozenset(labels) for labels in known.labels}
    assert len(distinct) > 200, "the labels no longer tell the requests apart"
    before = requests_by_rung(server)
    answers = asyncio.run(ask_all(server, known.texts))
    assert wrong(known, answers, list(range(2000))) == []
    ran = requests_by_rung(server) - before
    assert sum(ran.values()) == 2000
    assert ran["mux:4"] > 100, ran
    assert "vllm:num_requests_running" in httpx.get(f"{server.base_url}/metrics").text


def test_bad_input_is_refused_and_hurts_nobody(server: LocalServer, folder: Path) -> None:
    known = Known(folder, 300)
    seen: dict[str, tuple[int, str]] = {}
    as_json = {"content-type": "application/json"}

    async def misbehave(session: aiohttp.ClientSession) -> None:
        long = " ".join(["w5"] * 600)
        requests = {
            "empty text": {"json": body("")},
            "empty list": {"json": body([])},
            "no input": {"json": {"model": "known"}},
            "a number": {"json": body(5)},
            "too long": {"json": body(long)},
            "one megabyte": {"json": body("w5 " * 350_000)},
            "unknown model": {"json": {"model": "nobody", "input": "w5"}},
            "token out of range": {"json": body([VOCAB_SIZE + 9])},
            "not JSON": {"data": b"{", "headers": as_json},
            "not UTF-8": {
                "data": b'{"model": "known", "input": "\xff\xfe"}',
                "headers": as_json,
            },
        }
        for name, request in requests.items():
            async with session.post("/classify", **request) as response:
                seen[name] = response.status, await response.text()

    answers = asyncio.run(ask_all(server, known.texts, misbehave, misbehave))
    assert wrong(known, answers, list(range(300))) == []
    for name, (status, text) in seen.items():
        assert 400 <= status < 500, (name, status, text)
        assert json.loads(text), name
    assert "512" in seen["too long"][1]
    assert seen["unknown model"][0] == 404
    assert httpx.get(f"{server.base_url}/health").status_code == 200


def test_a_client_that_hangs_up_does_not_hurt_its_partners(
    server: LocalServer, folder: Path
) -> None:
    known = Known(folder, 600)

    async def hang_up(session: aiohttp.ClientSession) -> None:
        for i in range(60):
            task = asyncio.create_task(ask(session, f"w{i + 1} w7"))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    answers = asyncio.run(ask_all(server, known.texts, hang_up))
    assert wrong(known, answers, list(range(600))) == []
    assert httpx.get(f"{server.base_url}/health").status_code == 200


def test_several_texts_in_one_request_keep_their_order(server: LocalServer, folder: Path) -> None:
    known = Known(folder, 40)
    response = httpx.post(f"{server.base_url}/classify", json=body(known.texts), timeout=60)
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(40))
    assert wrong(known, [item["label"] for item in data], list(range(40))) == []


def test_exact_answers_are_the_backbones_own_in_any_company(
    server: LocalServer, folder: Path
) -> None:
    known = Known(folder, 400)
    exact: dict[int, Any] = {}

    async def ask_exactly(session: aiohttp.ClientSession) -> None:
        async def one(index: int, salt: str) -> None:
            request = {**body(known.texts[index]), "cache_salt": salt}
            async with session.post("/classify", json=request) as response:
                exact[index] = (await response.json())["data"][0]["probs"]

        salts = ("exact", "exact:tenant")
        await asyncio.gather(*(one(index, salts[index % 2]) for index in range(60)))

    before = requests_by_rung(server)
    answers = asyncio.run(ask_all(server, known.texts, ask_exactly))
    assert wrong(known, answers, list(range(400))) == []
    assert (requests_by_rung(server) - before)["mux:4"] > 100
    found = torch.tensor([exact[index] for index in range(60)])
    assert (found - known.probabilities[1][:60]).abs().max() < 1e-5
    packed = (known.probabilities[4][:60] - known.probabilities[1][:60]).abs().amax(-1)
    assert packed.median() > 1e-3, "the probabilities no longer tell who ran alone"


def test_metrics_are_there_by_the_names_that_are_written_down(server: LocalServer) -> None:
    httpx.post(f"{server.base_url}/classify", json=body(["w1", "w2", "w3 w4", "w5", "w6"]))
    for _ in range(2):  # the second finds the first one's blocks
        httpx.post(f"{server.base_url}/classify", json=body([" ".join(["w5"] * 200)]))
    metrics = httpx.get(f"{server.base_url}/metrics").text
    root = Path(__file__).parents[2]
    for page in ("docs/operations.md", "examples/grafana.json"):
        names = set(re.findall(r"\b(?:revmux|vllm):\w+", (root / page).read_text()))
        assert len(names) > 5, page
        for name in names:
            assert re.search(rf"^{name}(_bucket)?{{", metrics, re.MULTILINE), (page, name)
    stages = set(re.findall(r'revmux:step_seconds_sum{.*stage="(\w+)"', metrics))
    assert stages == {"plan", "lower", "multiplex", "upper", "demultiplex", "step"}


def test_the_log_has_a_line_for_every_interval_in_which_something_ran(server: LocalServer) -> None:
    deadline = time.monotonic() + 30
    while not (
        found := re.findall(r"RevMUX: \d+ requests, .*mux:4 \d+%.*of the backbone", log(server))
    ):
        assert time.monotonic() < deadline, server.log_tail()
        httpx.post(f"{server.base_url}/classify", json=body(["w1 w2"] * 9))
        time.sleep(0.5)
    assert "padding" in found[0]
    time.sleep(3)
    lines = log(server).count("RevMUX: ")
    time.sleep(3)
    assert log(server).count("RevMUX: ") == lines, "silent while nothing runs"


def log(server: LocalServer) -> str:
    return server.log_path.read_text(encoding="utf-8", errors="replace")
