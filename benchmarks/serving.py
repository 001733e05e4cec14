"""Ray Serve measured: its front end, its second replica, and its router.

    python benchmarks/serving.py front revmux-llama        against `vllm serve`, one engine each
    python benchmarks/serving.py replicas revmux-llama     two engines against one
    python benchmarks/serving.py router MODEL              pack-aware against power-of-two choices

What is compared runs in one Ray cluster (two applications under two prefixes) or, for ``front``,
beside it, is up all the time, and is asked in alternating order, ``--rounds`` times. Every engine
computes with one thread. The client is on the same machine; where it must not compete for the
cores (``replicas``) it sends few requests of many texts each, so HTTP and client take little time.
One file, because the three commands share how servers are started, asked and compared.

MODEL may be a folder of `benchmarks/offline.py --write FOLDER`, with ``--load-format dummy`` among
``--vllm-args``.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import httpx
import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from revmux_vllm.bench.lengths import Lengths, choose_texts, make_texts
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import parse_rung_counts
from revmux_vllm.bench.workload import most_tokens, read_model, read_tokenizer
from revmux_vllm.rungs import Rung
from revmux_vllm.terminal import unwound_on_sigterm

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Console(stderr=True)
PORT = 8000
PAUSE_S = 2.0  # vLLM's engine spins for a second after its last step

Model = Annotated[str, typer.Argument(help="Checkpoint folder or bundled name.")]
VllmArgs = Annotated[str, typer.Option(help="Options of `vllm serve` for every engine.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds after one to warm up.")]
LengthsMix = Annotated[str, typer.Option(help="texts, fixed:N or lognormal.")]
Output = Annotated[Path | None, typer.Option(help="JSON file to write.")]


@contextmanager
def applications(**options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Ray Serve applications by name, each under its prefix, and their addresses."""
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "3")
    from revmux_vllm.serving.application import app as build
    from revmux_vllm.serving.application import prepare_environment
    from revmux_vllm.serving.options import read_options

    prepare_environment()
    import ray
    from ray import serve

    ray.init(address="local", namespace="serve", logging_level="ERROR", log_to_driver=False)
    try:
        with unwound_on_sigterm():  # again, because Ray has set a handler that aborts
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            with console.status("starting the engines"):
                for name, values in options.items():
                    application = build(read_options(values))
                    serve.run(application, name=name, route_prefix=f"/{name}")
                addresses = {name: f"http://127.0.0.1:{PORT}/{name}" for name in options}
                for address in addresses.values():
                    _wait_ready(address)
            yield addresses
    finally:
        serve.shutdown()
        ray.shutdown()


def _wait_ready(address: str) -> None:
    """HAProxy learns of an application a moment after Serve does."""
    deadline = time.monotonic() + 60
    while httpx.get(f"{address}/health", timeout=60).status_code != 200:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{address} is not ready")
        time.sleep(0.5)


def texts_of(model: str, lengths: str) -> list[str]:
    """The benchmark's texts for a model."""
    mix, file = choose_texts(Lengths.parse(lengths), None)
    folder = read_model(model, "dummy").folder
    tokenizer = read_tokenizer(folder)
    return make_texts(tokenizer, mix, most_tokens(folder, tokenizer), 0, file)


class Caller:
    """Asks one server; used inside ``asyncio.run``."""

    def __init__(self, address: str, model: str, texts: list[str]) -> None:
        self.address, self.model, self.texts = address, model, texts
        self.latencies_s: list[float] = []

    async def _ask(self, session: aiohttp.ClientSession, first: int, per_request: int) -> None:
        chosen = [self.texts[(first + i) % len(self.texts)] for i in range(per_request)]
        body = {"model": self.model, "input": chosen if per_request > 1 else chosen[0]}
        began = time.perf_counter()
        async with session.post(f"{self.address}/classify", json=body) as response:
            answer = await response.json()
            if response.status != 200 or len(answer["data"]) != per_request:
                raise RuntimeError(f"{response.status}: {answer}")
        self.latencies_s.append(time.perf_counter() - began)

    def burst(self, num_texts: int, connections: int, per_request: int = 1) -> float:
        """Texts per second of a closed loop."""

        async def run() -> float:
            async with _session(connections) as session:
                began = time.perf_counter()
                firsts = range(0, num_texts, per_request)
                await asyncio.gather(*(self._ask(session, i, per_request) for i in firsts))
                return num_texts / (time.perf_counter() - began)

        return asyncio.run(run())

    def offer(self, rate: float, seconds: float, seed: int) -> None:
        """Poisson arrivals, an open loop."""

        async def run() -> None:
            rng = random.Random(seed)
            async with _session(0) as session:
                tasks, due = [], time.monotonic()
                end = due + seconds
                while (due := due + rng.expovariate(rate)) < end:
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    first = rng.randrange(len(self.texts))
                    tasks.append(asyncio.create_task(self._ask(session, first, 1)))
                await asyncio.gather(*tasks)

        asyncio.run(run())

    def rungs(self) -> Counter[str]:
        """Requests by rung so far, of all replicas."""
        return parse_rung_counts(httpx.get(f"{self.address}/metrics", timeout=60).text)


def _session(connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=None),
    )


def alternate(ask: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results by name and round, in this order and in the reverse one by turns."""
    found: dict[str, list[float]] = {name: [] for name in ask}
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=(rounds + 1) * len(ask))
        for turn in range(rounds + 1):
            for name in ask if turn % 2 else reversed(ask):
                time.sleep(PAUSE_S)
                found[name].append(ask[name]())
                progress.advance(task)
    return {name: values[1:] for name, values in found.items()}


def report(title: str, found: dict[str, list[float]], output: Path | None) -> None:
    """Medians, spread, and the ratio of the second to the first, round by round."""
    base, other = found
    ratios = [b / a for a, b in zip(found[base], found[other], strict=True)]
    table = Table("", "median", "lowest", "highest", title=title)
    rows = {f"{name}, texts/s": values for name, values in found.items()}
    for name, values in (rows | {f"{other} / {base}": ratios}).items():
        numbers = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps({"title": title, **found, "ratios": ratios}) + "\n")


@app.command()
def front(
    model: Model,
    vllm_args: VllmArgs = "",
    lengths: LengthsMix = "texts",
    texts: Annotated[int, typer.Option(help="Texts of a burst.")] = 600,
    connections: Annotated[int, typer.Option(help="Requests under way.")] = 64,
    rounds: Rounds = 5,
    output: Output = None,
) -> None:
    """One engine behind Ray Serve against one behind `vllm serve`, one text a request."""
    sent = texts_of(model, lengths)
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    plain = LocalServer(model, vllm_args.split(), env)
    with plain, applications(one={"model": model, "vllm_args": vllm_args}) as urls:
        plain.wait_ready()
        served = {"vllm serve": plain.base_url, "Ray Serve": urls["one"]}
        callers = {name: Caller(url, model, sent) for name, url in served.items()}
        bursts = {
            name: lambda caller=caller: caller.burst(texts, connections)
            for name, caller in callers.items()
        }
        report(f"{model}: {connections} under way", alternate(bursts, rounds), output)


@app.command()
def replicas(
    model: Model,
    vllm_args: VllmArgs = "",
    lengths: LengthsMix = "texts",
    texts: Annotated[int, typer.Option(help="Texts of a burst.")] = 2048,
    per_request: Annotated[int, typer.Option(help="Texts of a request.")] = 64,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep every engine to one core, as on a machine of one.")
    ] = False,
    rounds: Rounds = 5,
    output: Output = None,
) -> None:
    """Two engines against one, of a thread each; few requests of many texts."""
    sent = texts_of(model, lengths)
    common = {"model": model, "vllm_args": vllm_args, "cpus_per_replica": 0.5}
    with applications(one=common, two=common | {"replicas": 2}) as urls:
        if pin:
            for name in urls:
                _pin(name)
        callers = {name: Caller(url, model, sent) for name, url in urls.items()}
        bursts = {
            name: lambda caller=caller: caller.burst(texts, 16, per_request)
            for name, caller in callers.items()
        }
        report(f"{model}: {per_request} texts a request", alternate(bursts, rounds), output)


def _pin(name: str) -> None:
    """Each engine of an application, and all its processes, to the next core."""
    engines = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::") and f":{name}:Engine" in " ".join(process.cmdline())
    ]
    for core, engine in enumerate(engines):
        for process in [engine, *engine.children(recursive=True)]:
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {core % (os.cpu_count() or 1)})
    console.print(f"{name}: {len(engines)} engines kept to a core each")


@app.command()
def router(
    model: Model,
    vllm_args: VllmArgs = "",
    lengths: LengthsMix = "texts",
    engines: Annotated[int, typer.Option(help="Replicas behind each router.")] = 4,
    load: Annotated[float, typer.Option(help="Share of what they answer in a burst.")] = 0.6,
    seconds: Annotated[float, typer.Option(help="Of load, in every round.")] = 40,
    texts: Annotated[int, typer.Option(help="Texts of the burst.")] = 600,
    fill_ms: Annotated[float | None, typer.Option(help="Of the pack-aware router.")] = None,
    rounds: Rounds = 5,
    output: Output = None,
) -> None:
    """The same arrivals through both routers: mean width, p50 and p99."""
    sent = texts_of(model, lengths)
    common: dict[str, Any] = {"model": model, "vllm_args": vllm_args, "replicas": engines}
    common["cpus_per_replica"] = 0.2  # more engines than cores: they share them
    pack = common | ({} if fill_ms is None else {"fill_ms": fill_ms})
    with applications(power_of_two=common | {"router": "power-of-two"}, pack=pack) as urls:
        callers = {name: Caller(url, model, sent) for name, url in urls.items()}
        bursts = {name: callers[name].burst(texts, 128) for name in callers}
        bursts = {name: callers[name].burst(texts, 128) for name in callers}
        rate = load * statistics.mean(bursts.values())
        found: dict[str, list[dict[str, float]]] = {name: [] for name in callers}
        with Progress(console=console) as progress:
            task = progress.add_task(f"{rate:.1f} requests/s", total=2 * rounds)
            for turn in range(rounds):
                for name in callers if turn % 2 else reversed(callers):
                    time.sleep(PAUSE_S)
                    found[name].append(_under(callers[name], rate, seconds, turn))
                    progress.advance(task)
    table = Table("", "width", "p50 ms", "p99 ms", title=f"{model}: {rate:.1f} requests/s")
    for name, rows in found.items():
        cells = []
        for key in ("width", "p50_ms", "p99_ms"):
            values = [row[key] for row in rows]
            low, high = min(values), max(values)
            cells.append(f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})")
        table.add_row(name, *cells)
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps({"bursts": bursts, "rate": rate, **found}) + "\n")


def _under(caller: Caller, rate: float, seconds: float, seed: int) -> dict[str, float]:
    before = caller.rungs()
    caller.latencies_s.clear()
    caller.offer(rate, seconds, seed)
    time.sleep(1.0)
    ran = caller.rungs() - before
    sequences = sum(n / Rung.parse(rung).mux for rung, n in ran.items())
    ordered = sorted(1000 * latency for latency in caller.latencies_s)
    return {
        "width": ran.total() / sequences,
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "requests": len(ordered),
    }


if __name__ == "__main__":
    with unwound_on_sigterm():
        app()
