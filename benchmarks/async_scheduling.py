"""Asynchronous scheduling on and off: throughput and latency of one checkpoint, in turn.

vLLM leaves it off for pooling models, and its CPU platform turns it off whatever the user asks for;
here it is turned on again behind that, so that it can be measured at all. Two engines, each in a
process of its own, answer the same prompts in alternating order; ratios are of one round.
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
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.terminal import AsJson, make_console

LONE = 40
"""Requests, each sent when the one before it is answered, of which a round takes the median."""


def start_engine(model: str, is_async: bool, dtype: str) -> InProcessEngine:
    """An engine with two steps in flight, or with one."""
    from vllm.platforms.cpu import CpuPlatform

    vllms = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        vllms(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_async

    CpuPlatform.check_and_update_config = classmethod(  # type: ignore[assignment]
        check_and_update_config
    )
    return InProcessEngine(
        resolve(model), dtype=dtype, enforce_eager=True, async_scheduling=is_async
    )


def serve(there: Connection, model: str, is_async: bool, dtype: str) -> None:
    """The child: for a rung and prompts, requests per second and the latency of a lone one."""
    engine = start_engine(model, is_async, dtype)
    core: Any = engine.llm.llm_engine.engine_core
    there.send(core.engine_core.batch_queue_size)
    while (asked := there.recv()) is not None:
        rung, prompts = asked
        engine.run_at(rung)
        began = time.perf_counter()
        engine.classify(prompts)
        rate = len(prompts) / (time.perf_counter() - began)
        alone = []
        for prompt in prompts[:LONE]:
            began = time.perf_counter()
            engine.classify([prompt])
            alone.append(time.perf_counter() - began)
        there.send((rate, 1e3 * statistics.median(alone)))
    engine.close()


def main(
    model: str = "revmux-llama",
    rungs: Annotated[str, typer.Option(help="Beside the backbone alone.")] = "mux:4",
    requests: int = 640,
    tokens: Annotated[int, typer.Option(help="Of every prompt.")] = 40,
    rounds: int = 5,
    dtype: str = "float32",
    as_json: AsJson = False,
) -> None:
    """Throughput and lone latency at every rung: off, on, and on over off of the same round."""
    context = multiprocessing.get_context("spawn")
    engines: dict[bool, Connection] = {}
    processes = []
    for is_async in (False, True):
        engines[is_async], there = context.Pipe()
        process = context.Process(target=serve, args=(there, model, is_async, dtype))
        process.start()
        processes.append(process)
        assert engines[is_async].recv() == 1 + is_async, "steps in flight"
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 10_000) for _ in range(tokens)] for _ in range(requests)]
    rows = []
    for rung in (Rung(), *parse_rungs(rungs.split(","))):
        seen: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(rounds + 1):
            for is_async in (False, True) if number % 2 else (True, False):
                engines[is_async].send((rung, prompts))
                seen[is_async].append(engines[is_async].recv())
        for at, what in enumerate(("requests/s", "lone, ms")):
            off, on = ([entry[at] for entry in seen[each][1:]] for each in (False, True))
            ratios = [b / a for a, b in zip(off, on, strict=True)]
            rows.append({"rung": str(rung), "what": what, "off": off, "on": on, "ratio": ratios})
    for is_async, process in zip(engines, processes, strict=True):
        engines[is_async].send(None)
        process.join()
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("rung", "", "off", "on", "on over off", "lowest to highest")
    for row in rows:
        medians = [f"{statistics.median(row[each]):.2f}" for each in ("off", "on", "ratio")]
        spread = f"{min(row['ratio']):.2f} to {max(row['ratio']):.2f}"
        table.add_row(row["rung"], row["what"], *medians, spread)
    make_console().print(table)


if __name__ == "__main__":
    typer.run(main)
