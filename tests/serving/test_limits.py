"""What a server of few places and few retries does: it refuses, gives up, replaces what hangs."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from known_answers import Known, make_transparent_checkpoint
from ray_server import (
    CORE,
    ENGINE,
    Client,
    answering,
    is_alive,
    kill,
    processes,
    serving,
    wait_until,
)

from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.serving.replica import STALLED_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = {"model": "known", "input": [" ".join(["w5"] * 500)] * 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transparent_checkpoint(tmp_path_factory.mktemp("limits"), 512, 6)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    options = {"max_ongoing": 2, "max_queued": 1, "retries": 1, "fronts": 1}
    words = [word for key, value in options.items() for word in ("--option", f"{key}={value}")]
    with serving(folder, *words) as running:
        yield running


async def ask_long(server: LocalServer) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.base_url, timeout=600) as client:
        return await client.post("/classify", json=LONG)


def is_in_service(server: LocalServer) -> bool:
    return len(answering(server)) == 1


def test_beyond_the_places_that_there_are_it_answers_429(server: LocalServer, folder: Path) -> None:
    client = Client(server.base_url, Known(folder, 100))
    asyncio.run(client.ask_all(100, 50))
    assert set(client.statuses) == {200, 429}, client.statuses
    assert client.wrong == []

    async def eight_long() -> list[httpx.Response]:
        return await asyncio.gather(*(ask_long(server) for _ in range(8)))

    answers = asyncio.run(eight_long())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert refused[0].json()["error"]["type"] == "TooManyRequests"
    done = [answer for answer in answers if answer.status_code == 200]
    assert all(len(answer.json()["data"]) == len(LONG["input"]) for answer in done)
    assert len(done) + len(refused) == 8


def test_a_request_that_ends_every_engine_is_given_up(server: LocalServer) -> None:
    """No such request is known: so whichever engine has it is killed."""

    async def story() -> Any:
        asked = asyncio.create_task(ask_long(server))
        killed = []
        while not asked.done():
            for process in await asyncio.to_thread(answering, server):
                await asyncio.sleep(0.5)  # it has the request by now
                kill(process)
                killed.append(process)
            await asyncio.sleep(0.1)
        return await asked, killed

    answer, killed = asyncio.run(story())
    assert answer.status_code == 503, answer.text
    assert "2 engines died while they had this request" in answer.json()["error"]["message"]
    assert len(killed) == 2
    wait_until(lambda: is_in_service(server), 180, "an engine for the others")
    assert httpx.get(f"{server.base_url}/health", timeout=60).status_code == 200


def test_an_engine_that_hangs_is_replaced_and_its_request_answered(server: LocalServer) -> None:
    wait_until(lambda: is_in_service(server), 180, "an engine")
    wait_until(lambda: len(processes(server, CORE)) == 1, 30, "its process")
    (core,) = processes(server, CORE)
    (replica,) = processes(server, ENGINE)

    def leaves() -> bool:
        with suppress(httpx.TimeoutException):  # answered all the same, until the replica leaves
            httpx.get(f"{server.base_url}/health", timeout=2)
        return not is_alive(replica)

    async def story() -> Any:
        core.send_signal(signal.SIGSTOP)
        asked = asyncio.create_task(ask_long(server))
        await asyncio.to_thread(wait_until, leaves, STALLED_S + 20, "its replica leaves")
        core.send_signal(signal.SIGCONT)  # or it could not notice that its parent is gone
        return await asked

    answer = asyncio.run(story())
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == len(LONG["input"])
    wait_until(lambda: not is_alive(core), 30, "no engine outlives its replica")
