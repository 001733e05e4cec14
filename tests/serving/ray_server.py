"""`revmux serve` with a model whose answers are known, its processes, and requests to it."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
from known_answers import Known
from prometheus_client.parser import text_string_to_metric_families
from workers import on_all_cores

from revmux_vllm.bench.local_server import RAY, LocalServer

ENGINE, FRONT = "ray::ServeReplica:default:Engine", "ray::ServeReplica:default:Front"
CORE = "vLLM's engine process"
HELPER = "multiprocessing.resource_tracker"
PACKED = '--additional-config \'{"revmux": {"policy": "fixed:4"}}\''
VLLM_ARGS = f"--served-model-name known --enforce-eager --dtype float32 {PACKED}"


@contextmanager
def serving(folder: Path, *options: str, wait_s: float = 300) -> Iterator[LocalServer]:
    """The checkpoint behind Ray Serve, ready; every composite is as wide as it can be."""
    extra = ("--vllm-args", VLLM_ARGS, *options)
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    with on_all_cores(), LocalServer(folder, extra, env, start=RAY) as server:
        server.wait_ready(wait_s)
        yield server


def processes(server: LocalServer, name: str) -> list[psutil.Process]:
    """Those of this server's session whose command begins with ``name``.

    ``CORE`` is what an engine's replica has started, but for Python's own helper: vLLM names that
    process too, but now and then the name does not take.
    """
    assert server._process is not None
    found, engines = {}, set()
    for process in session_of(server._process.pid):
        with suppress(psutil.NoSuchProcess):
            found[process] = command = process.cmdline() or [""]
            if command[0].startswith(ENGINE):
                engines.add(process.pid)
    if name != CORE:
        return [process for process, command in found.items() if command[0].startswith(name)]
    return [
        process
        for process, command in found.items()
        if parent_of(process) in engines and HELPER not in " ".join(command)
    ]


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may be waited for by nobody."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def parent_of(process: psutil.Process) -> int | None:
    """None where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None


def session_of(leader: int) -> list[psutil.Process]:
    """Processes of the session that a process began."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def replicas(server: LocalServer) -> dict[str, float]:
    """Names of the engines that answer now, and when their processes started."""
    page = httpx.get(f"{server.base_url}/metrics", timeout=30).raise_for_status().text
    return {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "process_start_time_seconds"
    }


def answering(server: LocalServer) -> list[psutil.Process]:
    """Their processes."""
    started = replicas(server).values()
    return [
        process
        for process in processes(server, ENGINE)
        if any(abs(process.create_time() - at) < 0.05 for at in started)
    ]


def wait_until(
    holds: Callable[[], bool], seconds: float, what: str, server: LocalServer | None = None
) -> float:
    """Seconds that it took; a failure shows the processes of ``server``."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > seconds:
            shown = "" if server is None else "\n" + all_processes(server)
            raise AssertionError(f"not within {seconds:.0f} s: {what}{shown}")
        time.sleep(0.2)
    return time.monotonic() - started


def all_processes(server: LocalServer) -> str:
    """A line each, for a failing test, and what the server said last."""
    assert server._process is not None
    lines = []
    for process in session_of(server._process.pid):
        with suppress(psutil.NoSuchProcess), process.oneshot():
            age = time.time() - process.create_time()
            line = f"{process.pid} of {process.ppid()}, {process.status()}, {age:.0f} s: "
            lines.append(line + " ".join(process.cmdline())[:100])
    log = server.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([*lines, *log[-40:]])


class Client:
    """Asks texts of ``known`` and checks what comes.

    Attributes:
        statuses: of all answers, and the names of errors.
        wrong: texts that got another's label.
    """

    def __init__(self, base_url: str, known: Known) -> None:
        self.base_url, self.known = base_url, known
        self.statuses: Counter[Any] = Counter()
        self.wrong: list[int] = []

    async def ask(self, session: aiohttp.ClientSession, index: int, salt: str | None) -> None:
        body = {"model": "known", "input": self.known.texts[index]}
        if salt:
            body["cache_salt"] = salt
        try:
            async with session.post("/classify", json=body) as response:
                self.statuses[response.status] += 1
                answer = await response.json(content_type=None)
                if response.status != 200:
                    print(response.status, answer)
                elif answer["data"][0]["label"] not in self.known.labels[index]:
                    self.wrong.append(index)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.statuses[type(error).__name__] += 1

    async def ask_all(
        self, num_requests: int, connections: int, beside: Callable[[], Any] | None = None
    ) -> None:
        """A closed loop; ``beside`` is a coroutine function that runs until all is answered."""
        connector = aiohttp.TCPConnector(limit=connections)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=900)
        rng = random.Random(0)
        salts: Sequence[str | None] = (None, None, None, "tenant-a", "tenant-b", "exact")
        async with aiohttp.ClientSession(
            self.base_url, connector=connector, timeout=timeout
        ) as session:
            other = asyncio.create_task(beside()) if beside else None
            total = len(self.known.texts)
            await asyncio.gather(
                *(self.ask(session, i % total, rng.choice(salts)) for i in range(num_requests))
            )
            if other:
                other.cancel()
                with suppress(asyncio.CancelledError):
                    await other


def kill(process: psutil.Process) -> None:
    """SIGKILL, of one of the server's own processes."""
    process.send_signal(signal.SIGKILL)
