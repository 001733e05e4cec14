"""Mixed traffic on ``/classify``, every answer of which is checked as it comes."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from known_answers import Known

MAX_IN_FLIGHT = 2000
NUM_TENANTS = 20
KINDS = {"good": 0.89, "several": 0.02, "abort": 0.05, "too long": 0.02, "malformed": 0.02}
SAME_ANSWER = 1e-5  # batches of other sizes round otherwise

_AS_JSON = {"content-type": "application/json"}
MALFORMED: list[dict[str, Any]] = [
    {"data": b"{", "headers": _AS_JSON},
    {"data": b'{"model": "known", "input": "\xff\xfe"}', "headers": _AS_JSON},
    {"json": {"model": "known"}},
    {"json": {"model": "known", "input": 5}},
    {"json": {"model": "known", "input": ["w5", 5]}},
    {"json": {"model": "nobody", "input": "w5"}},
]


def pace(seconds: float) -> float:
    """The rate over its mean: 10 s at 2, 20 s at a half."""
    return 2.0 if seconds % 30 < 10 else 0.5


@dataclass
class Tally:
    """What was offered and what came of it.

    Attributes:
        arrivals: requests that were due.
        shed: those not sent, because ``MAX_IN_FLIGHT`` were under way.
        sent: the others by kind, and the probes.
        ended: these by how: answered, refused, aborted, failed.
        answers: texts that were answered; a request may hold several.
        latencies_s: from the time when a request was due.
        lag_s: the latest that a request was sent after it was due.
        problems: everything that must not happen.
    """

    arrivals: int = 0
    shed: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    answers: int = 0
    latencies_s: list[float] = field(default_factory=list)
    lag_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def check(self, is_right: bool, problem: str) -> None:
        if not is_right:
            self.problems.append(problem)


class Load:
    """Requests of one client about texts whose answers are known, and their tally."""

    def __init__(self, session: aiohttp.ClientSession, known: Known) -> None:
        self.session = session
        self.known = known
        self.tally = Tally()
        self.rng = random.Random(0)
        self._alone = known.probabilities[1].tolist()

    async def offer(self, rate: float, seconds: float) -> None:
        """Poisson arrivals of mean ``rate`` for so long; returns when all of them have ended."""
        under_way: set[asyncio.Task[None]] = set()
        started = due = time.monotonic()
        while (due := due + self.rng.expovariate(rate * pace(due - started))) < started + seconds:
            await asyncio.sleep(due - time.monotonic())
            self.tally.arrivals += 1
            self.tally.lag_s = max(self.tally.lag_s, time.monotonic() - due)
            if len(under_way) >= MAX_IN_FLIGHT:
                self.tally.shed += 1
                continue
            task = asyncio.create_task(self.one_of_many(due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def probe(self, index: int, until: float) -> None:
        """A tenant of its own asks one text again and again: packed answers are isolation broken.

        One at a time, or it would be its own company.
        """
        while time.monotonic() < until:
            await self.count("probe", self.ask([index], f"probe-{index}"))
            await asyncio.sleep(self.rng.uniform(0, 0.5))

    async def burst(self, num_requests: int, connections: int, salt: str | None) -> float:
        """So many requests over so many connections, the next when one is answered: requests/s."""
        gate = asyncio.Semaphore(connections)

        async def one(index: int) -> None:
            async with gate:
                await self.count("burst", self.ask([index], salt))

        started = time.monotonic()
        indices = (number % len(self.known.texts) for number in range(num_requests))
        await asyncio.gather(*(one(index) for index in indices))
        return num_requests / (time.monotonic() - started)

    async def one_of_many(self, due: float) -> None:
        """A request of some kind from its arrival to its end, whichever that is."""
        (kind,) = self.rng.choices(list(KINDS), list(KINDS.values()))
        if kind in ("too long", "malformed"):
            await self.count(kind, self.be_refused(kind))
        elif kind == "abort":
            await self.count(kind, self.hang_up(self.ask(*self.draw(1))))
        else:
            num_texts = self.rng.randint(2, 8) if kind == "several" else 1
            await self.count(kind, self.ask(*self.draw(num_texts)))
            self.tally.latencies_s.append(time.monotonic() - due)

    async def count(self, kind: str, request: Coroutine[Any, Any, str]) -> None:
        """Await a request and count how it ended."""
        self.tally.sent[kind] += 1
        how = "failed"
        try:
            how = await request
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.tally.problems.append(f"{kind}: {error!r}")
        self.tally.ended[how] += 1

    def draw(self, num_texts: int) -> tuple[list[int], str | None, str | None]:
        """Texts, one of them far more often than the others; a salt; an X-Request-Id."""
        rng = self.rng
        indices = [rng.randrange(len(self.known.texts)) for _ in range(num_texts)]
        if rng.random() < 0.2:
            indices[0] = 0
        tenant = f"tenant-{rng.randrange(NUM_TENANTS)}"
        exact = rng.choice(("exact", f"exact:{tenant}"))
        (salt,) = rng.choices((None, tenant, exact), (0.6, 0.3, 0.1))
        (name,) = rng.choices((None, "the-same", f"own-{self.tally.arrivals}"), (0.8, 0.1, 0.1))
        return indices, salt, name

    async def ask(self, indices: list[int], salt: str | None, name: str | None = None) -> str:
        """Texts in one body; every answer is checked."""
        texts = [self.known.texts[index] for index in indices]
        body: dict[str, Any] = {"model": "known", "input": texts if len(texts) > 1 else texts[0]}
        if salt is not None:
            body["cache_salt"] = salt
        headers = {} if name is None else {"X-Request-Id": name}
        async with self.session.post("/classify", json=body, headers=headers) as response:
            answer = await response.json(content_type=None)
        self.tally.statuses[response.status] += 1
        if response.status != 200:
            self.tally.problems.append(f"{response.status}: {answer}")
            return "failed"
        self.tally.answers += len(answer["data"])
        order = [item["index"] for item in answer["data"]]
        self.tally.check(order == list(range(len(texts))), f"{len(texts)} texts, answers {order}")
        for index, item in zip(indices, answer["data"], strict=False):
            self.check_answer(index, item, salt or "")
        return "answered"

    def check_answer(self, index: int, item: dict[str, Any], salt: str) -> None:
        """A label that the text may get; where it runs alone, the backbone's own answer."""
        allowed, label = self.known.labels[index], item["label"]
        if salt.startswith(("exact", "probe")):
            alone = self._alone[index]
            allowed = {f"LABEL_{alone.index(max(alone))}"}
            apart = max(abs(p - q) for p, q in zip(item["probs"], alone, strict=True))
            what = f"text {index}, salt {salt}: {apart:.1e} from the backbone's answer"
            self.tally.check(apart < SAME_ANSWER, what)
        what = f"text {index}, salt {salt!r}: {label}, expected one of {allowed}"
        self.tally.check(label in allowed, what)

    async def hang_up(self, request: Coroutine[Any, Any, str]) -> str:
        """Close the connection soon, unless the answer is there first."""
        try:
            return await asyncio.wait_for(request, self.rng.uniform(0, 0.2))
        except TimeoutError:
            return "aborted"

    async def be_refused(self, kind: str) -> str:
        """Something bad: the client's fault, and of too long a text the limit must be named."""
        request = self.rng.choice(MALFORMED)
        if kind == "too long":
            words = " ".join(["w5"] * self.rng.randint(513, 2000))
            request = {"json": {"model": "known", "input": words}}
        async with self.session.post("/classify", **request) as response:
            text = await response.text()
        self.tally.statuses[response.status] += 1
        self.tally.check(400 <= response.status < 500, f"{kind}: {response.status} {text}")
        self.tally.check(kind != "too long" or "512" in text, f"no limit named: {text}")
        return "refused"
