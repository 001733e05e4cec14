"""A model that takes very long texts, under short ones: the first answer of a burst, and memory.

The checkpoint is given more positions than it was trained with, since here no answer is judged.
RevMUX, by load, and plain vLLM over the same weights run in processes of their own and answer the
same burst in alternating order; ratios are of one round. Steps and sequences are vLLM's defaults.
Plain vLLM would take a share of all memory for keys and values, so it gets the least with which it
starts: those of the longest prompt.
"""

import json
import multiprocessing
import random
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from revmux_vllm import checkpoint
from revmux_vllm.bench.workload import Model, read_model
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.terminal import AsJson, make_console

PLAIN, OURS = "plain vLLM", "RevMUX"
BLOCK_TOKENS = 128
"""Of vLLM's pages on a CPU."""


def serve(there: Connection, model: str, options: dict[str, Any]) -> None:
    """The child: tokens of a step and bytes of pages; then for every burst what it measured."""
    engine = InProcessEngine(model, **options)
    scheduler = engine.scheduler
    pages = sum(tensor.size for tensor in scheduler.kv_cache_config.kv_cache_tensors)
    there.send((scheduler.max_num_scheduled_tokens, pages))
    while (prompts := there.recv()) is not None:
        there.send((*burst(engine, prompts), resident()))
    engine.close()


def burst(engine: InProcessEngine, prompts: list[list[int]]) -> tuple[float, float]:
    """Seconds from the arrival of ``prompts`` to the first and to the last answer."""
    from vllm import PoolingParams, TokensPrompt

    vllms: Any = engine.llm.llm_engine
    began, times = time.perf_counter(), []
    for i, prompt in enumerate(prompts):
        text = TokensPrompt(prompt_token_ids=prompt)
        vllms.add_request(str(i), text, PoolingParams(task="classify"))
    while vllms.has_unfinished_requests():
        times += [time.perf_counter() - began for _ in vllms.step()]
    assert len(times) == len(prompts)
    return times[0], times[-1]


def resident() -> int:
    """Bytes of this process and its worker."""
    here = psutil.Process()
    return sum(each.memory_info().rss for each in (here, *here.children(recursive=True)))


def options_of(model: Model, name: str, positions: int, dtype: str, policy: str) -> dict[str, Any]:
    """Of ``vllm.LLM``."""
    overrides: dict[str, Any] = {"max_position_embeddings": positions}
    options = {"max_model_len": positions, "dtype": dtype, "enforce_eager": True}
    options["enable_prefix_caching"] = False  # or repeated bursts are answered from it
    if name == OURS:
        more = {"additional_config": {"revmux": {"policy": policy}}}
        return options | {"hf_overrides": overrides} | more
    values = checkpoint.read_config(model.folder)[1]
    heads = values["num_key_value_heads"] * values["head_dim"]
    token_bytes = 2 * heads * model.num_layers * (4 if dtype == "float32" else 2)
    return options | {
        "hf_overrides": overrides | {"architectures": [model.plain_architecture]},
        "kv_cache_memory_bytes": (positions + 2 * BLOCK_TOKENS) * token_bytes,
    }


def main(
    name: Annotated[str, typer.Option("--model")] = "revmux-llama",
    positions: int = 131_072,
    requests: int = 128,
    tokens: Annotated[int, typer.Option(help="Of every prompt.")] = 400,
    rounds: int = 7,
    dtype: str = "float32",
    policy: Annotated[str, typer.Option(help="As in --additional-config revmux.")] = "load",
    as_json: AsJson = False,
) -> None:
    """The first and the last answer of a burst, and memory: plain vLLM and RevMUX."""
    model, context = read_model(name), multiprocessing.get_context("spawn")
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 10_000) for _ in range(tokens)] for _ in range(requests)]
    report: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {PLAIN: checkpoint.plain_backbone(model.folder, Path(folder)), OURS: model.folder}
        engines: dict[str, Connection] = {}
        for which, path in models.items():
            engines[which], there = context.Pipe()
            given = options_of(model, which, positions, dtype, policy)
            context.Process(target=serve, args=(there, str(path), given)).start()
            step_tokens, pages = engines[which].recv()
            report[which] = {"step_tokens": step_tokens, "pages": pages, "first": [], "last": []}
        for number in range(rounds + 1):
            for which in list(models) if number % 2 else list(models)[::-1]:
                engines[which].send(prompts)
                first, last, resident_bytes = engines[which].recv()
                report[which]["resident"] = resident_bytes
                if number:  # the first one warms up
                    report[which]["first"].append(first)
                    report[which]["last"].append(last)
        for engine in engines.values():
            engine.send(None)
    if as_json:
        print(json.dumps(report))
        return
    table = Table("", "tokens a step", "first, s", "last, s", "pages, MiB", "resident, MiB")
    for which, row in report.items():
        times = [f"{statistics.median(row[key]):.3f}" for key in ("first", "last")]
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("pages", "resident")]
        table.add_row(which, f"{row['step_tokens']:,}", *times, *sizes)
    make_console().print(table)
    for key in ("first", "last"):
        ratios = [a / b for a, b in zip(report[OURS][key], report[PLAIN][key], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        make_console().print(f"{key}: {statistics.median(ratios):.2f} of plain vLLM's ({spread})")


if __name__ == "__main__":
    typer.run(main)
