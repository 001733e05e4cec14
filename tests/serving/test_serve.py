"""The real thing: Ray Serve, HAProxy, two engines; and processes that are killed under load."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from known_answers import Known, make_transparent_checkpoint
from ray_server import (
    CORE,
    ENGINE,
    FRONT,
    Client,
    answering,
    is_alive,
    kill,
    processes,
    replicas,
    serving,
    session_of,
    wait_until,
)

from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import parse_rung_counts

# One cluster's ports on a machine at a time.
pytestmark = pytest.mark.timeout(900)

NOTICED_S = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transparent_checkpoint(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def known(folder: Path) -> Known:
    return Known(folder, 600)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    with serving(folder, "--replicas", "2") as running:
        yield running


def test_each_of_many_requests_gets_its_own_answer(server: LocalServer, known: Known) -> None:
    client = Client(server.base_url, known)
    asyncio.run(client.ask_all(1200, connections=64))
    assert client.statuses == {200: 1200}
    assert client.wrong == []
    metrics = httpx.get(f"{server.base_url}/metrics", timeout=30).text
    counts = parse_rung_counts(metrics)
    assert counts["mux:4"] > 100, counts
    assert "vllm:num_requests_running" in metrics
    assert len(replicas(server)) == 2


def test_the_routes_are_vllms(server: LocalServer, known: Known) -> None:
    url = server.base_url
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "known"
    several = httpx.post(
        f"{url}/classify", json={"model": "known", "input": known.texts[:40]}, timeout=60
    ).json()
    assert [item["index"] for item in several["data"]] == list(range(40))
    for i, item in enumerate(several["data"]):
        assert item["label"] in known.labels[i]
    assert several["usage"]["prompt_tokens"] == sum(map(len, known.prompts[:40]))
    pooled = httpx.post(f"{url}/pooling", json={"model": "known", "input": "w5 w6"}, timeout=60)
    assert len(pooled.json()["data"][0]["data"]) == 256


def test_what_is_nested_too_deep_ends_no_replica(server: LocalServer) -> None:
    deep = "[" * 100_000 + "1" + "]" * 100_000
    body, headers = f'{{"model": "known", "input": {deep}}}', {"content-type": "application/json"}
    answer = httpx.post(f"{server.base_url}/classify", content=body, headers=headers, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    assert len(replicas(server)) == 2


BAD: dict[str, tuple[int, dict[str, Any]]] = {
    "no input": (400, {"json": {"model": "known"}}),
    "a number": (400, {"json": {"model": "known", "input": 5}}),
    "too long": (400, {"json": {"model": "known", "input": " ".join(["w5"] * 600)}}),
    "unknown model": (404, {"json": {"model": "nobody", "input": "w5"}}),
    "not JSON": (400, {"content": b"{", "headers": {"content-type": "application/json"}}),
    "half a megabyte": (400, {"json": {"model": "known", "input": "w5 " * 175_000}}),
    "too many texts": (413, {"json": {"model": "known", "input": ["w5"] * 100_000}}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_vllms_words(server: LocalServer, name: str) -> None:
    status, request = BAD[name]
    response = httpx.post(f"{server.base_url}/classify", timeout=60, **request)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert error["message"]
    if name == "too long":
        assert "512" in error["message"]
    assert httpx.get(f"{server.base_url}/nowhere").status_code == 404
    assert httpx.get(f"{server.base_url}/classify").status_code == 405


def test_a_client_that_hangs_up_frees_its_place(server: LocalServer, known: Known) -> None:
    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            for i in range(40):
                body = {"model": "known", "input": [known.texts[i]] * 8}
                task = asyncio.create_task(client.post("/classify", json=body))
                await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    client = Client(server.base_url, known)
    asyncio.run(client.ask_all(300, 32, beside=hang_up))
    assert client.statuses == {200: 300}
    assert client.wrong == []


async def ask_while_killing(server: LocalServer, known: Known, victim: str) -> None:
    """900 requests, and after a second one process of the kind is killed; all are answered."""
    killed: list[psutil.Process] = []

    async def killer() -> None:
        await asyncio.sleep(1.0)
        killed.append(random.choice(processes(server, victim)))
        kill(killed[0])

    client = Client(server.base_url, known)
    await client.ask_all(900, 48, beside=killer)
    assert len(killed) == 1
    assert client.statuses == {200: 900}
    assert client.wrong == []


def test_a_front_that_is_killed_loses_no_answer(server: LocalServer, known: Known) -> None:
    asyncio.run(ask_while_killing(server, known, FRONT))
    wait_until(lambda: len(processes(server, FRONT)) == 2, 60, "another in its place")


def test_a_dead_engine_is_noticed_without_a_request(server: LocalServer) -> None:
    wait_until(lambda: len(processes(server, CORE)) == 2, 180, "both engines", server)
    before = replicas(server)
    kill(processes(server, CORE)[0])
    wait_until(
        lambda: len(replicas(server).keys() & before) == 1, NOTICED_S, "it is out of service"
    )
    wait_until(lambda: len(replicas(server)) == 2, 180, "another in its place")


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_ten_thousand_requests_while_a_replica_is_killed_every_5_s(
    server: LocalServer, known: Known
) -> None:
    """Of those that answer: an engine takes longer than 5 s to start, and then it gets its 5 s."""
    client, num_killed = Client(server.base_url, known), 0

    async def killer() -> None:
        nonlocal num_killed
        while True:
            while not (ready := await asyncio.to_thread(answering, server)):
                await asyncio.sleep(0.5)
            await asyncio.sleep(5.0)
            kill(random.choice(ready))
            num_killed += 1
            print(f"{num_killed} killed, {sum(client.statuses.values())} answered")

    asyncio.run(client.ask_all(10_000, 64, beside=killer))
    assert num_killed > 3
    assert client.statuses == {200: 10_000}
    assert client.wrong == []
    wait_until(lambda: len(replicas(server)) == 2, 180, "two engines that answer")


@pytest.mark.parametrize("victim", [pytest.param(CORE, marks=pytest.mark.slow), ENGINE])
def test_an_engine_or_replica_that_is_killed_loses_no_answer(
    server: LocalServer, known: Known, victim: str
) -> None:
    wait_until(lambda: len(replicas(server)) == 2, 180, "two engines that answer")
    # The fronts may still name one that has just died.
    wait_until(lambda: len(processes(server, CORE)) == 2, 180, "both engines", server)
    before = {process.pid for process in processes(server, ENGINE)}
    cores = processes(server, CORE)
    asyncio.run(ask_while_killing(server, known, victim))
    wait_until(
        lambda: bool({process.pid for process in processes(server, ENGINE)} - before),
        60,
        "another in its place",
        server,
    )
    assert sum(map(is_alive, cores)) == 1, "no engine outlives its replica"


def test_sigterm_ends_everything(server: LocalServer) -> None:
    """The last test, so that it needs no server of its own."""
    process = server._process
    assert process is not None
    process.terminate()
    assert process.wait(60) > 0, "unwound, not aborted by Ray's own handler"
    wait_until(lambda: session_of(process.pid) == [], 20, "all that it started has ended")
