"""Asynchronous scheduling on and off: throughput and latency of one checkpoint, in turn.

vLLM leaves it off for pooling models, and its CPU platform turns it off whatever the user asks for;
here it is turned on again behind that, so that it can be measured at all. Two engines, each in a
process of its own, answer the same prompts in alternating order; ratios are of one round. Engines
are started several times, since one that is once slow stays so; what the schedule itself changes is
the time outside the model.
"""

import json
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection
from typing import Annotated, Any

import typer
from rich.table import Table

from revmux_vllm.bundled import resolve
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.engine.stages import STAGES
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.terminal import AsJson, make_console

WHAT = ("requests/s", "outside the model, %", "lone, ms", "loaded, ms", "loaded p95, ms")
LONE = 40
"""Requests, each sent when the one before it is answered, of which a round takes the median."""


def scheduling(is_async: bool) -> Any:
    """In place of the CPU platform's ``check_and_update_config``, with what was asked for."""
    from vllm.platforms.cpu import CpuPlatform

    vllms = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        vllms(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_async

    return classmethod(check_and_update_config)


def start_engine(model: str, is_async: bool, dtype: str) -> InProcessEngine:
    """An engine with two steps in flight, or with one."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.check_and_update_config = scheduling(is_async)  # type: ignore[method-assign]
    return InProcessEngine(
        resolve(model),
        dtype=dtype,
        enforce_eager=True,
        async_scheduling=is_async,
        enable_prefix_caching=False,  # or rounds are answered from it
    )


def serve(there: Connection, model: str, is_async: bool, dtype: str) -> None:
    """The child: for a rung, prompts and a rate it sends back what ``WHAT`` names."""
    engine = start_engine(model, is_async, dtype)
    core: Any = engine.llm.llm_engine.engine_core
    there.send(core.engine_core.batch_queue_size)
    while (asked := there.recv()) is not None:
        rung, prompts, per_s = asked
        engine.run_at(rung)
        engine.planner.counts.clear()
        began = time.perf_counter()
        engine.classify(prompts)
        rate = len(prompts) / (time.perf_counter() - began)
        outside = outside_percent(engine)
        alone = []
        for prompt in prompts[:LONE]:
            began = time.perf_counter()
            engine.classify([prompt])
            alone.append(time.perf_counter() - began)
        loaded = [1e3 * seconds for seconds in latencies(engine, prompts, per_s)]
        p95 = statistics.quantiles(loaded, n=20)[-1]
        lone_ms = 1e3 * statistics.median(alone)
        there.send((rate, outside, lone_ms, statistics.median(loaded), p95))
    engine.close()


def outside_percent(engine: InProcessEngine) -> float:
    """Part of the steps' time in which the model did not run, since the counts were cleared."""
    counts = engine.planner.counts
    inside_us = sum(counts["us", stage] for stage in STAGES)
    return 100 * (1 - inside_us / counts["us", "step"])


def latencies(engine: InProcessEngine, prompts: list[list[int]], per_s: float) -> list[float]:
    """Seconds from when each of ``prompts`` was due, at random ``per_s``, to its answer."""
    from vllm import PoolingParams, TokensPrompt

    rng, vllms = random.Random(0), engine.llm.llm_engine
    due = [0.0]
    for _ in prompts[1:]:
        due.append(due[-1] + rng.expovariate(per_s))
    began, sent, seconds = time.perf_counter(), 0, []
    while sent < len(prompts) or vllms.has_unfinished_requests():
        now = time.perf_counter() - began
        while sent < len(prompts) and due[sent] <= now:
            text = TokensPrompt(prompt_token_ids=prompts[sent])
            vllms.add_request(str(sent), text, PoolingParams(task="classify"))
            sent += 1
        outputs = vllms.step() if vllms.has_unfinished_requests() else []
        now = time.perf_counter() - began
        seconds += [now - due[int(output.request_id)] for output in outputs]
    return seconds


Rows = dict[tuple[str, str], dict[bool, list[float]]]
"""By rung and what was measured: with one step in flight (False) or two, round for round."""


def measure(rows: Rows, model: str, dtype: str, asked: Any, rungs: Any, rounds: int) -> None:
    """One pair of engines, which take turns; the one that starts first changes with every pair."""
    context = multiprocessing.get_context("spawn")
    engines: dict[bool, Connection] = {}
    processes = []
    for is_async in (False, True) if len(next(iter(rows.values()))[True]) % 2 else (True, False):
        engines[is_async], there = context.Pipe()
        process = context.Process(target=serve, args=(there, model, is_async, dtype))
        process.start()
        processes.append(process)
        assert engines[is_async].recv() == 1 + is_async, "steps in flight"
    for rung in rungs:
        for number in range(rounds + 1):
            for is_async in (False, True) if number % 2 else (True, False):
                engines[is_async].send((rung, *asked))
                seen = engines[is_async].recv()
                if number:  # the first one warms up
                    for what, value in zip(WHAT, seen, strict=True):
                        rows[str(rung), what][is_async].append(value)
    for engine in engines.values():
        engine.send(None)
    for process in processes:
        process.join()


def main(
    model: str = "revmux-llama",
    rungs: Annotated[str, typer.Option(help="Beside the backbone alone.")] = "mux:4",
    requests: int = 640,
    tokens: Annotated[int, typer.Option(help="Of every prompt.")] = 40,
    per_s: Annotated[float, typer.Option(help="Requests that come while it is loaded.")] = 100,
    pairs: Annotated[int, typer.Option(help="Of engines, one after the other.")] = 3,
    rounds: Annotated[int, typer.Option(help="Of every pair, at every rung.")] = 5,
    dtype: str = "float32",
    as_json: AsJson = False,
) -> None:
    """Throughput and latencies at every rung: off, on, and on over off of the same round."""
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 10_000) for _ in range(tokens)] for _ in range(requests)]
    at = (Rung(), *parse_rungs(rungs.split(",")))
    rows: Rows = {(str(rung), what): {False: [], True: []} for rung in at for what in WHAT}
    for _ in range(pairs):
        measure(rows, model, dtype, (prompts, per_s), at, rounds)
    if as_json:
        print(json.dumps([[*key, seen[False], seen[True]] for key, seen in rows.items()]))
        return
    table = Table("rung", "", "off", "on", "on over off", "lowest to highest")
    for (rung, what), seen in rows.items():
        ratios = [on / off for off, on in zip(seen[False], seen[True], strict=True)]
        numbers = [statistics.median(each) for each in (seen[False], seen[True], ratios)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(rung, what, *(f"{number:.2f}" for number in numbers), spread)
    make_console().print(table)


if __name__ == "__main__":
    typer.run(main)
