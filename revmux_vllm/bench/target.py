"""One server under one load: what the client saw, and what the server says of the same time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from revmux_vllm.bench.client import ClientError, Load, Outcome, run_client
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import Snapshot, settled

CONCURRENCY = 128
"""Requests under way at once while capacity is measured."""
BURST_S = 10.0
WARM_UP = 16
"""Texts of the request that warms a server up and says how many a burst needs."""


@dataclass(frozen=True)
class Target:
    """A server that is ready.

    Attributes:
        name: ``revmux`` or ``plain``.
        server: the process.
        served_name: what its clients call the model.
        texts: sent over and over.
        check: called while a load runs; raises when some server has died.
    """

    name: str
    server: LocalServer
    served_name: str
    texts: Sequence[str]
    check: Callable[[], None]

    def warm_up(self) -> float:
        """Requests per second of a small batch, the second of two.

        Raises:
            ClientError: with the server's words, if it refuses the texts.
        """
        texts = [self.texts[i % len(self.texts)] for i in range(WARM_UP)]
        body = {"model": self.served_name, "input": texts, "truncate_prompt_tokens": -1}
        url = f"{self.server.base_url}/pooling"
        for _ in range(2):
            answer = httpx.post(url, json=body, timeout=600, trust_env=False)
            if answer.is_error:
                raise ClientError(f"{self.name}: {answer.status_code} {answer.text}")
        return WARM_UP / answer.elapsed.total_seconds()

    def capacity(self, seconds: float) -> float:
        """Requests per second of a closed burst of about ``seconds``.

        Raises:
            ClientError: if a request is not answered.
        """
        rate = self.warm_up()
        for _ in range(2):
            num_requests = max(2 * WARM_UP, round(rate * seconds))
            outcome = self._run(Load(math.inf, num_requests, max_concurrency=CONCURRENCY), seconds)
            if outcome.errors:
                raise ClientError(
                    f"{self.name}: {outcome.errors} of {num_requests} requests unanswered; its log "
                    f"ends with\n{self.server.log_tail()}"
                )
            rate = outcome.achieved
            if outcome.duration_s > seconds / 2:
                break
        return rate

    def under(self, load: Load) -> dict[str, Any]:
        """What ``load`` did; milliseconds are means over the requests where nothing else is said.

        Returns:
            The fields of ``Outcome``, those of ``split``, the CPU time of the API server per second
            (``front_end_cpu``) and the ``requests_by_rung``, empty for plain vLLM.
        """
        before = Snapshot.of(self.server.base_url)
        outcome = self._run(load, load.num_requests / load.rate)
        answered = load.num_requests - outcome.errors
        after = settled(self.server.base_url, before, answered)
        cpu = None
        if after.cpu_s is not None and before.cpu_s is not None:
            cpu = (after.cpu_s - before.cpu_s) / outcome.duration_s
        return {
            **asdict(outcome),
            **split(outcome.mean_ms, after.means_since(before)),
            "front_end_cpu": cpu,
            "requests_by_rung": dict(sorted((after.rungs - before.rungs).items())),
        }

    def _run(self, load: Load, seconds: float) -> Outcome:
        timeout_s = 600 + 20 * seconds  # an overloaded server answers long after the last arrival
        return run_client(
            self.server.base_url, self.served_name, self.texts, load, timeout_s, self.check
        )


def split(mean_ms: float | None, means: Mapping[str, float | None]) -> dict[str, Any]:
    """Where the time of a request went, on average.

    Args:
        mean_ms: latency at the client.
        means: of the server's histograms.

    Returns:
        ``means`` with ``rest_ms``, what the client saw beyond queue and inference, and ``limit``:
        where more than half of the time went, ``engine`` or ``front end`` (HTTP, tokenising, the
        client). Under overload that is the one whose queue grows. A step that a request finds
        running is the engine's too; it is in the server's time, and at most another inference.
        Both are None where a part is not known.
    """
    queue, inference, server = (means[key] for key in ("queue_ms", "inference_ms", "server_ms"))
    if mean_ms is None or queue is None or inference is None or server is None:
        return {**means, "rest_ms": None, "limit": None}
    engine = queue + inference
    running_step = min(max(server - engine, 0.0), inference)
    limit = "engine" if engine + running_step > mean_ms / 2 else "front end"
    return {**means, "rest_ms": mean_ms - engine, "limit": limit}
