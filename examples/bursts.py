"""Ask ``/classify`` many things at once, and read back at which rungs they ran."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from revmux_vllm.bench.metrics import SETTLE_S, parse_rung_counts


@dataclass(frozen=True)
class Answer:
    """What one text is answered.

    Attributes:
        label: the likeliest, by name, or by place where the model has no names.
        probability: of it.
        probs: of all labels in order.
        place: of the likeliest among them.
    """

    label: str
    probability: float
    probs: tuple[float, ...] = ()
    place: int = 0

    @classmethod
    def from_response(cls, body: Mapping[str, Any]) -> "Answer":
        """Read one ``/classify`` answer; a model without label names is answered by index."""
        data = body["data"][0]
        best = max(data["probs"])
        place = data["probs"].index(best)
        return cls(data["label"] or str(place), best, tuple(data["probs"]), place)


class Target:
    """A served model behind a pool of ``concurrency`` connections, inside an ``async with`` block.

    aiohttp and not httpx: with 128 connections httpx took 3.3 ms of CPU time for a request, aiohttp
    0.4 ms, and on a small machine that is time the server lacks.
    """

    def __init__(self, base_url: str, model: str, concurrency: int) -> None:
        self.model = model
        self._session = aiohttp.ClientSession(
            base_url,
            # The pool is the queue: as many requests are under way as there are connections.
            # They are dropped before the server's end does so, after 5 s.
            connector=aiohttp.TCPConnector(limit=concurrency, keepalive_timeout=2),
            timeout=aiohttp.ClientTimeout(sock_read=120),
            raise_for_status=True,
        )

    async def __aenter__(self) -> "Target":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def classify(self, text: str) -> Answer:
        """One request. Raises aiohttp.ClientError unless it was answered."""
        body = {"model": self.model, "input": text}
        async with self._session.post("/classify", json=body) as response:
            return Answer.from_response(await response.json())

    async def burst(self, texts: Sequence[str]) -> tuple[list[Answer], float]:
        """All texts at once: the answers in order, and requests per second."""
        started = time.perf_counter()
        answers = await asyncio.gather(*(self.classify(text) for text in texts))
        return answers, len(texts) / (time.perf_counter() - started)

    async def batch(self, prompts: Sequence[Sequence[int]]) -> float:
        """All prompts, as token ids, in one request: prompts per second."""
        body = {"model": self.model, "input": prompts}
        started = time.perf_counter()
        async with self._session.post("/classify", json=body) as response:
            answers = (await response.json())["data"]
        assert len(answers) == len(prompts)
        return len(prompts) / (time.perf_counter() - started)

    async def rung_counts(self) -> Counter[str]:
        """Requests by rung since the server started."""
        async with self._session.get("/metrics") as response:
            return parse_rung_counts(await response.text())

    async def rung_counts_since(self, before: Counter[str], num_requests: int) -> Counter[str]:
        """Requests by rung since ``before``, once all ``num_requests`` are counted.

        The server counts a step after sending its answers; what is missing after ``SETTLE_S``
        stays missing.
        """
        deadline = time.monotonic() + SETTLE_S
        while True:
            counts = await self.rung_counts() - before
            if counts.total() >= num_requests or time.monotonic() > deadline:
                return counts
            await asyncio.sleep(0.2)
