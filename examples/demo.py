"""Serve the bundled classifier, multiplexed and not, and compare answers and throughput.

Two servers of the same backbone: ``revmux-llama`` as it is bundled, and its backbone alone under
vLLM's own class. Bursts alternate between them, and each waits for the other to fall idle, so both
see the same machine.
"""

import asyncio
import json
import statistics
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from bursts import Answer, Target
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.table import Table

from revmux_vllm import checkpoint
from revmux_vllm.bench.local_server import ServerError
from revmux_vllm.bench.metrics import mixed_layer_limit
from revmux_vllm.bench.servers import PLAIN, check_alive, progress_bar, server_pair, wait_for
from revmux_vllm.bundled import resolve
from revmux_vllm.errors import UserError
from revmux_vllm.terminal import AsJson, unwound_on_sigterm

MODEL = "revmux-llama"
# vLLM's workers spin for a second after their last step (shm_broadcast.py, SpinCondition).
PAUSE_S = 1.5
SENTENCES = Path(__file__).with_name("sentences.txt")

progress_console = Console(stderr=True)


@dataclass(frozen=True)
class Result:
    """What the bursts gave; the lists run over rounds."""

    answers: list[Answer]
    plain_answers: list[Answer]
    rates: list[float]
    plain_rates: list[float]
    rung_counts: Counter[str]
    limit: float

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.rates) / statistics.median(self.plain_rates)

    @property
    def round_ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.rates, self.plain_rates, strict=True)]

    @property
    def agreement(self) -> float:
        """Share of the texts that both servers gave the same label, in the last round."""
        pairs = zip(self.answers, self.plain_answers, strict=True)
        return sum(a.label == b.label for a, b in pairs) / len(self.answers)


async def measure(
    urls: tuple[str, str], texts: list[str], rounds: int, concurrency: int, layers: tuple[int, int]
) -> Result:
    """A warm-up burst to each server, then ``rounds`` bursts to each in alternating order."""
    answers: list[list[Answer]] = [[], []]
    rates: list[list[float]] = [[], []]
    async with AsyncExitStack() as stack:
        targets = [
            await stack.enter_async_context(Target(url, name, concurrency))
            for url, name in zip(urls, (MODEL, PLAIN), strict=True)
        ]
        progress = stack.enter_context(
            progress_bar(progress_console, BarColumn(), MofNCompleteColumn())
        )
        task = progress.add_task(f"Bursts of {len(texts)} requests", total=2 * (rounds + 1))
        for target in targets:
            await target.burst(texts)
            progress.advance(task)
        before = await targets[0].rung_counts_since(Counter(), len(texts))
        for number in range(rounds):
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                await asyncio.sleep(PAUSE_S)
                answers[i], rate = await targets[i].burst(texts)
                rates[i].append(rate)
                progress.advance(task)
        counts = await targets[0].rung_counts_since(before, rounds * len(texts))
    return Result(
        answers=answers[0],
        plain_answers=answers[1],
        rates=rates[0],
        plain_rates=rates[1],
        rung_counts=counts,
        limit=mixed_layer_limit(counts, *layers),
    )


def print_answers(console: Console, texts: list[str], result: Result, rows: int) -> None:
    """A sample of the answers, evenly chosen."""
    table = Table("sentence", MODEL, "probability", "plain backbone", title="Answers")
    table.columns[2].justify = "right"
    for row in range(min(rows, len(texts))):
        i = row * len(texts) // min(rows, len(texts))
        ours, plain = result.answers[i], result.plain_answers[i]
        note = f"{plain.label} (same)" if plain.label == ours.label else f"{plain.label} (differs)"
        style = None if plain.label == ours.label else "bold"
        table.add_row(texts[i], ours.label, f"{ours.probability:.3f}", note, style=style)
    console.print(table)
    console.print(f"Both answer alike on {result.agreement:.1%} of {len(texts)} sentences.\n")


def print_measurements(console: Console, result: Result) -> None:
    """Rungs and throughput."""
    table = Table("rung", "requests", "share", title="Requests by rung (mux:N: N in a composite)")
    total = result.rung_counts.total()
    for rung, count in sorted(result.rung_counts.items()):
        table.add_row(rung, str(count), f"{count / total:.1%}")
    console.print(table)
    table = Table("server", "median requests/s", "min", "max", title="Throughput")
    for name, rates in ((MODEL, result.rates), ("plain backbone", result.plain_rates)):
        values = (statistics.median(rates), min(rates), max(rates))
        table.add_row(name, *(f"{value:.1f}" for value in values))
    console.print(table)
    low, high = min(result.round_ratios), max(result.round_ratios)
    console.print(
        f"Ratio of medians [bold]{result.ratio:.2f}x[/bold] ({low:.2f} to {high:.2f} over "
        f"{len(result.rates)} rounds); layer limit of these rungs {result.limit:.2f}x."
    )
    console.print(
        "Over HTTP the front end (tokenising, HTTP, this client) bounds the ratio too: "
        "multiplexing speeds up the model, not the front end."
    )


def to_json(texts: list[str], result: Result) -> dict[str, Any]:
    """Everything the tables say, for machines."""
    triples = zip(texts, result.answers, result.plain_answers, strict=True)
    return {
        "model": MODEL,
        "ratio_of_medians": result.ratio,
        "round_ratios": result.round_ratios,
        "layer_limit": result.limit,
        "agreement": result.agreement,
        "requests_by_rung": dict(sorted(result.rung_counts.items())),
        "requests_per_s": {MODEL: result.rates, PLAIN: result.plain_rates},
        "answers": [
            {"text": text, **asdict(ours), "plain": asdict(plain)} for text, ours, plain in triples
        ],
    }


def run(texts: list[str], rounds: int, concurrency: int) -> Result:
    """Start both servers, measure, and stop them whatever happens."""
    config, values = checkpoint.read_config(resolve(MODEL))
    layers = (config.prefill_layers, values["num_hidden_layers"])
    with server_pair(MODEL) as servers:
        wait_for(servers, progress_console)
        urls = (servers[0].base_url, servers[1].base_url)
        try:
            return asyncio.run(measure(urls, texts, rounds, concurrency, layers))
        except (aiohttp.ClientError, TimeoutError) as error:
            check_alive(servers)
            raise ServerError(f"a request was not answered: {error!r}") from error


def main(
    rounds: Annotated[int, typer.Option(min=5, help="Measured bursts to each server.")] = 5,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Sentences to show.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Classify bundled sentences with revmux-llama and with its backbone alone, and compare."""
    texts = SENTENCES.read_text(encoding="utf-8").splitlines()
    try:
        with unwound_on_sigterm():
            result = run(texts, rounds, concurrency)
    except (ServerError, UserError) as error:
        progress_console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(to_json(texts, result)))
        return
    console = Console()
    print_answers(console, texts, result, rows)
    print_measurements(console, result)


if __name__ == "__main__":
    typer.run(main)
