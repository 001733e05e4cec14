"""Serve a bundled classifier, multiplexed and not, and compare answers and throughput.

Two servers of the same backbone, the bundled model under an accuracy contract and its backbone
alone under vLLM's own class, get the same bursts by turns; each waits for the other to fall idle,
so both see the same machine. Then a third server, which runs everything in composites, does the
same with half of the sentences. A few of them warm every server up, and say how many the others
may be.

On CPUs nothing is compiled, for vLLM's compiler generates no code there and takes its time.
"""

import asyncio
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from bursts import Answer, Target
from plot import plot_demo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.table import Table
from transformers import AutoTokenizer

from revmux_vllm import checkpoint
from revmux_vllm.bench.local_server import LocalServer, ServerError
from revmux_vllm.bench.metrics import mixed_layer_limit
from revmux_vllm.bench.servers import (
    PLAIN,
    check_alive,
    multiplexed_server,
    progress_bar,
    server_pair,
    wait_for,
)
from revmux_vllm.bench.settings import NOTHING_KEPT
from revmux_vllm.bundled import resolve
from revmux_vllm.engine.platform import is_cpu
from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Rung
from revmux_vllm.terminal import AsJson, unwound_on_sigterm

# vLLM's workers spin for a second after their last step (shm_broadcast.py, SpinCondition).
PAUSE_S = 1.5
SENTENCES = Path(__file__).with_name("sentences.txt")
WARM_UP = 16
"""Sentences that every server gets first."""
FEWEST, BURST_S = 40, 3.0
"""Unless told otherwise a burst is what the plain backbone answers in so many seconds."""
LOAD, COMPOSITES = "under load", "in composites"

progress_console = Console(stderr=True)


@dataclass(frozen=True)
class Comparison:
    """A server and the plain backbone, by turns; lists of rates run over rounds.

    Attributes:
        answers, plain_answers: in the last round.
        rates, plain_rates: requests per second over HTTP, one text in each.
        engine_rates, plain_engine_rates: texts per second when all are one request of token ids, so
            that the engine alone counts.
        rung_counts: requests by what the upper layers ran on.
        limit: layer limit of these rungs.
    """

    answers: list[Answer]
    plain_answers: list[Answer]
    rates: list[float]
    plain_rates: list[float]
    engine_rates: list[float]
    plain_engine_rates: list[float]
    rung_counts: Counter[str]
    limit: float

    @property
    def ratio(self) -> float:
        """Over HTTP, of the medians."""
        return statistics.median(self.rates) / statistics.median(self.plain_rates)

    @property
    def engine_ratio(self) -> float:
        """In the engine, of the medians."""
        return statistics.median(self.engine_rates) / statistics.median(self.plain_engine_rates)

    @property
    def agreement(self) -> float:
        """Share of the texts to which both give the same label."""
        pairs = zip(self.answers, self.plain_answers, strict=True)
        return sum(a.label == b.label for a, b in pairs) / len(self.answers)

    @property
    def distance(self) -> float:
        """Mean difference of the probability of the plain backbone's label."""
        pairs = zip(self.answers, self.plain_answers, strict=True)
        return statistics.mean(abs(a.probs[b.place] - b.probability) for a, b in pairs)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        values = asdict(self) | {"rung_counts": dict(sorted(self.rung_counts.items()))}
        values |= {name: getattr(self, name) for name in ("ratio", "engine_ratio")}
        return values | {"agreement": self.agreement, "mean_distance": self.distance}


class Demo:
    """What is asked, and of which model.

    Args:
        model: bundled name or checkpoint folder.
        texts: sentences to choose from.
        count: sentences of every burst; None: by how fast the plain backbone is.
        rounds: measured bursts to each server.
        concurrency: requests under way at once.
        agreement: that the bundled model's contract promises; None: it uses rungs, with none.
        min_agreement: of these rungs.
        server_args: options of ``vllm serve`` for all servers.
    """

    def __init__(
        self,
        model: str,
        texts: list[str],
        count: int | None,
        rounds: int,
        concurrency: int,
        agreement: float | None,
        min_agreement: float,
        server_args: Sequence[str] = (),
    ) -> None:
        self.model, self.rounds, self.concurrency = model, rounds, concurrency
        self.texts, self.count = texts, count
        self.server_args = NOTHING_KEPT, *server_args
        keeps = {"min_agreement": min_agreement} if agreement is None else {"agreement": agreement}
        self.options = {"revmux": keeps}
        folder = resolve(model)
        config, values = checkpoint.read_config(folder)
        self.layers = config.prefill_layers, values["num_hidden_layers"]
        self.composites = [rung for rung in config.rungs if rung == Rung(mux=rung.mux)]
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.prompts: dict[str, list[int]] = {text: tokenizer(text)["input_ids"] for text in texts}

    def run(self) -> dict[str, Comparison]:
        """Start the servers, measure, and stop them whatever happens."""
        found = {}
        args = self.server_args
        with server_pair(self.model, args, self.options) as (ours, plain):
            wait_for((ours, plain), progress_console)
            found[LOAD] = self._compare((ours, plain), LOAD, share=1)
            if self.composites:
                options = {"revmux": {"policy": f"fixed:{self.composites[0]}"}}
                with multiplexed_server(self.model, args, options) as fixed:
                    wait_for((fixed,), progress_console)
                    found[COMPOSITES] = self._compare((fixed, plain), COMPOSITES, share=2)
        return found

    def _compare(self, servers: Sequence[LocalServer], what: str, share: int) -> Comparison:
        try:
            return asyncio.run(self._measure([server.base_url for server in servers], what, share))
        except (aiohttp.ClientError, TimeoutError) as error:
            check_alive(servers)
            raise ServerError(f"a request was not answered: {error!r}") from error

    async def _measure(self, urls: Sequence[str], what: str, share: int) -> Comparison:
        """A few texts to warm up, then ``rounds`` in alternating order, of one in ``share``."""
        answers: list[list[Answer]] = [[], []]
        rates: list[list[float]] = [[], []]
        engine_rates: list[list[float]] = [[], []]
        async with AsyncExitStack() as stack:
            targets = [
                await stack.enter_async_context(Target(url, name, self.concurrency))
                for url, name in zip(urls, (self.model, PLAIN), strict=True)
            ]
            for target in targets:
                await target.burst(self.texts[:WARM_UP])
                rate = await target.batch([self.prompts[text] for text in self.texts[:WARM_UP]])
            self.count = self.count or max(FEWEST, round(BURST_S * rate))
            texts = spread(self.texts, self.count)[::share]
            prompts = [self.prompts[text] for text in texts]
            bar = progress_bar(progress_console, BarColumn(), MofNCompleteColumn())
            progress = stack.enter_context(bar)
            description = f"{len(texts)} sentences, {what} and plain"
            task = progress.add_task(description, total=2 * self.rounds)
            before = await targets[0].rung_counts()
            for number in range(self.rounds):
                for i in (0, 1) if number % 2 == 0 else (1, 0):
                    await asyncio.sleep(PAUSE_S)
                    answers[i], rate = await targets[i].burst(texts)
                    rates[i].append(rate)
                    engine_rates[i].append(await targets[i].batch(prompts))
                    progress.advance(task)
            asked = 2 * self.rounds * len(texts)
            counts = await targets[0].rung_counts_since(before, asked)
        limit = mixed_layer_limit(counts, *self.layers)
        return Comparison(*answers, *rates, *engine_rates, counts, limit)


def spread(texts: list[str], count: int) -> list[str]:
    """So many of the texts, evenly chosen."""
    return texts[:: max(1, len(texts) // count)][:count]


def print_answers(console: Console, texts: list[str], found: Comparison, rows: int) -> None:
    """A sample of the answers, evenly chosen."""
    table = Table("sentence", LOAD, "probability", "plain backbone", title="Answers")
    table.columns[2].justify = "right"
    for row in range(min(rows, len(texts))):
        i = row * len(texts) // min(rows, len(texts))
        ours, plain = found.answers[i], found.plain_answers[i]
        same = plain.label == ours.label
        note = f"{plain.label} {plain.probability:.3f}" + ("" if same else " (differs)")
        style = None if same else "bold"
        table.add_row(texts[i], ours.label, f"{ours.probability:.3f}", note, style=style)
    console.print(table)


def print_measurements(console: Console, found: dict[str, Comparison], path: Path) -> None:
    """What ran, how fast, and how alike the answers are."""
    table = Table("beside plain vLLM, by turns", *found, title="Throughput and answers")
    some = list(found.values())

    def add(name: str, value: Callable[[Comparison], str]) -> None:
        table.add_row(name, *(value(one) for one in some))

    add("ran on", ran_on)
    add("requests/s over HTTP", lambda one: f"{statistics.median(one.rates):.1f}")
    add("plain vLLM's", lambda one: f"{statistics.median(one.plain_rates):.1f}")
    add("ratio over HTTP (of rounds)", over_http)
    add("ratio in the engine", lambda one: f"{one.engine_ratio:.2f}x")
    add("layer limit of these rungs", lambda one: f"{one.limit:.2f}x")
    add("same label as plain vLLM", lambda one: f"{one.agreement:.1%}")
    add("mean |p - p of plain vLLM|", lambda one: f"{one.distance:.3f}")
    console.print(table)
    console.print(
        f"{' and '.join(str(len(one.answers)) for one in some)} sentences at once, medians of "
        f"{len(some[0].rates)} rounds. "
        f"Plot written to {path}",
        soft_wrap=True,
    )


def ran_on(one: Comparison) -> str:
    """Shares of the rungs, the largest first."""
    total = one.rung_counts.total()
    return "\n".join(f"{rung} {count / total:.0%}" for rung, count in one.rung_counts.most_common())


def over_http(one: Comparison) -> str:
    """Ratio of medians, and the range over rounds."""
    ratios = [a / b for a, b in zip(one.rates, one.plain_rates, strict=True)]
    return f"[bold]{one.ratio:.2f}x[/bold] ({min(ratios):.2f} to {max(ratios):.2f})"


def main(
    model: Annotated[str, typer.Option(help="Bundled name.")] = "revmux-smollm2",
    sentences: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Of every burst; 320 at most. Default: what plain vLLM does in 3 s, 40 at least.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=5, help="Measured bursts to each server.")] = 5,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 128,
    agreement: Annotated[
        float, typer.Option(help="That the accuracy contract promises; 0: use rungs, with none.")
    ] = 0.95,
    min_agreement: Annotated[
        float, typer.Option(help="Measured agreement of the rungs, where there is no contract.")
    ] = 0.96,
    enforce_eager: Annotated[
        bool | None, typer.Option(help="Compile nothing. Default: on CPUs.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Sentences to show.")] = 12,
    plot: Annotated[Path, typer.Option(help="Picture to write.")] = Path("demo.png"),
    as_json: AsJson = False,
) -> None:
    """Classify sentences with a bundled model and with its backbone alone, and compare."""
    texts = SENTENCES.read_text(encoding="utf-8").splitlines()
    try:
        with unwound_on_sigterm():
            eager = is_cpu() if enforce_eager is None else enforce_eager
            args = ["--enforce-eager"] if eager else []
            promise = agreement or None
            demo = Demo(model, texts, sentences, rounds, concurrency, promise, min_agreement, args)
            found = demo.run()
        texts = spread(texts, demo.count or FEWEST)
    except (ServerError, UserError) as error:
        progress_console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    plot_demo(found, model, plot)
    if as_json:
        comparisons = {name: one.to_dict() for name, one in found.items()}
        print(json.dumps({"model": model, "texts": texts, **comparisons}))
        return
    console = Console()
    print_answers(console, texts, found[LOAD], rows)
    print_measurements(console, found, plot)


if __name__ == "__main__":
    typer.run(main)
