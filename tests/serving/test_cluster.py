"""Two nodes, as two `ray start` on this machine: scaling, a redeployment and a lost node."""

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from conftest import revmux
from known_answers import Known, make_transparent_checkpoint
from ray_server import PACKED, Client, session_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HEAD_PORT, DASHBOARD_PORT, HTTP_PORT = 26379, 28265, 28000
BIN = Path(sys.executable).parent
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.yaml"


class Node:
    """One `ray start --block`, and everything that it starts."""

    def __init__(self, words: str, log: Path, env: dict[str, str]) -> None:
        command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", *shlex.split(words)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def lose(self) -> None:
        """As when the power goes: every process at once."""
        for process in session_of(self.process.pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.lose()


class Cluster:
    """The nodes, what is deployed on them, and what they say of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        exports = revmux("serve --environment").output
        lines = [line.removeprefix("export ") for line in exports.splitlines()]
        self.env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        self.env |= dict(shlex.split(line)[0].split("=", 1) for line in lines)
        self.env |= {"RAY_ADDRESS": f"127.0.0.1:{HEAD_PORT}", "RAY_AUTH_MODE": "token"}
        self.env["RAY_raylet_start_wait_time_s"] = "120"  # two cores for everything
        subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=self.env, check=True)
        self.base_url = f"http://127.0.0.1:{HTTP_PORT}"
        self.dashboard = f"http://127.0.0.1:{DASHBOARD_PORT}"
        head = f"--head --port={HEAD_PORT} --dashboard-port={DASHBOARD_PORT}"
        self.nodes: list[Node] = []
        self.is_starting_a_node = False
        self._start, self._num_started = head, 0

    def add_node(self) -> None:
        """The head first, and then others."""
        log = self.folder / f"node{self._num_started}.log"
        self.is_starting_a_node = True
        node = Node(self._start, log, self.env)
        self.nodes.append(node)
        self._num_started += 1
        self._start = f"--address=127.0.0.1:{HEAD_PORT}"
        wait_until(
            lambda: "Ray runtime started" in log.read_text() or node.process.poll() is not None,
            120,
            "a node",
        )
        assert node.process.poll() is None, log.read_text()
        self.is_starting_a_node = False

    def deploy(self, **args: Any) -> None:
        """`serve deploy`, of the example's file with other arguments."""
        config = yaml.safe_load(EXAMPLE.read_text())
        config["proxy_location"] = "HeadOnly"  # both nodes have one set of ports
        config["http_options"] = {"host": "127.0.0.1", "port": HTTP_PORT}
        config["applications"][0]["args"] = args
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        self.serve("deploy", str(path))

    def serve(self, *words: str) -> None:
        command = [str(BIN / "serve"), words[0], "--address", self.dashboard, *words[1:]]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def application(self) -> dict[str, Any]:
        """What `serve status` shows and takes seconds of a core for."""
        token = (Path.home() / ".ray" / "auth_token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        url = f"{self.dashboard}/api/serve/applications/"
        page = httpx.get(url, headers=headers, timeout=60).raise_for_status().json()
        return page["applications"].get("revmux", {})

    def is_running(self, num_engines: int) -> bool:
        found = self.application()
        if found.get("status") == "DEPLOY_FAILED":
            pytest.fail(found["message"])
        engines = found.get("deployments", {}).get("Engine", {}).get("replicas", [])
        states = [engine["state"] for engine in engines]
        return found.get("status") == "RUNNING" and states == ["RUNNING"] * num_engines

    def close(self) -> None:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.serve("shutdown", "-y")
        for node in reversed(self.nodes):
            node.stop()
        from ray._common.utils import reset_ray_address

        reset_ray_address()  # or the next `serve run` on this machine waits for this cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transparent_checkpoint(tmp_path_factory.mktemp("cluster"), 512, 6)


@pytest.fixture(scope="module")
def known(folder: Path) -> Known:
    return Known(folder, 300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("nodes"))
    try:
        cluster.add_node()
        cluster.add_node()
        yield cluster
    finally:
        cluster.close()


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    words = f"--served-model-name known --enforce-eager --dtype float32 {PACKED}"
    return {"model": str(folder), "vllm_args": words, "cpus_per_replica": 1, **more}


def ask_while(cluster: Cluster, known: Known, happens: Callable[[], Any], least: int = 400) -> None:
    """Requests until ``happens`` has returned, and ``least`` of them; all are answered.

    They come slower while a node starts: it must share the cores that a real one brings, and Ray
    gives up a node whose first processes take more than 15 s.
    """
    client = Client(cluster.base_url, known)

    async def story() -> None:
        task = asyncio.create_task(asyncio.to_thread(happens))
        while not task.done() or sum(client.statuses.values()) < least:
            await client.ask_all(25, 6)
            if cluster.is_starting_a_node:
                await asyncio.sleep(2)
        await task

    asyncio.run(story())
    assert set(client.statuses) == {200}, client.statuses
    assert client.wrong == []


def test_the_load_adds_an_engine_and_its_lack_takes_it_away(
    cluster: Cluster, folder: Path, known: Known
) -> None:
    cluster.deploy(
        **arguments(folder, replicas=1, max_replicas=2, target_load=0.02),
        upscale_delay_s=2,
        downscale_delay_s=20,
    )
    wait_until(lambda: cluster.is_running(1), 300, "one engine")
    ask_while(
        cluster, known, lambda: wait_until(lambda: cluster.is_running(2), 240, "a second engine")
    )
    ask_while(cluster, known, lambda: None, least=100)
    wait_until(lambda: cluster.is_running(1), 240, "one engine again")
    assert httpx.get(f"{cluster.base_url}/health").status_code == 200


def test_a_redeployment_under_load_loses_no_answer(
    cluster: Cluster, folder: Path, known: Known
) -> None:
    cluster.deploy(**arguments(folder, replicas=2))
    wait_until(lambda: cluster.is_running(2), 300, "two engines")

    def redeploy() -> None:
        options = arguments(folder, replicas=2)
        cluster.deploy(**options | {"vllm_args": options["vllm_args"] + " --max-num-seqs 64"})
        wait_until(lambda: not cluster.is_running(2), 60, "a new version")
        wait_until(lambda: cluster.is_running(2), 400, "two engines of it")

    ask_while(cluster, known, redeploy)


def test_a_lost_node_loses_no_answer(cluster: Cluster, folder: Path, known: Known) -> None:
    cluster.deploy(**arguments(folder, replicas=2))
    wait_until(lambda: cluster.is_running(2), 300, "two engines")

    def lose_a_node() -> None:
        cluster.nodes.pop().lose()
        wait_until(lambda: not cluster.is_running(2), 90, "it is missed")
        cluster.add_node()
        wait_until(lambda: cluster.is_running(2), 300, "two engines again")

    ask_while(cluster, known, lose_a_node)


def test_what_cannot_start_fails_once_and_says_why(cluster: Cluster, folder: Path) -> None:
    words = arguments(folder)["vllm_args"] + " --enable-lora"
    cluster.deploy(**arguments(folder, replicas=1) | {"vllm_args": words})
    wait_until(lambda: cluster.application()["status"] == "DEPLOY_FAILED", 240, "the failure")
    message = str(cluster.application())
    assert "--enable-lora: adapters of another kind" in message
    cluster.deploy(model="/nowhere/at-all")
    wait_until(lambda: "no folder here" in str(cluster.application()), 120, "the failure")
    assert cluster.application()["status"] == "DEPLOY_FAILED"
