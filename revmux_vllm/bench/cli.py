"""``revmux bench``: the options of its two commands. What they need is imported when they run."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from revmux_vllm.bench.failures import MeasuringError
from revmux_vllm.engine.plain import PlainEngineError
from revmux_vllm.errors import require, within
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.terminal import (
    AsJson,
    check_plot,
    fail,
    make_console,
    mendable_errors,
    unwound_on_sigterm,
)

EXTRA = "bench"
"""Of this package: what the commands need beside vLLM."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a bundled name.")]
LengthsMix = Annotated[
    str,
    typer.Option(
        "--lengths",
        help="Of the texts: `texts` from a file, `fixed:N` tokens each (`fixed:2048` for long "
        "ones), or `lognormal` (median 33 tokens, sigma 0.8). The last two are made of words of "
        "the model's tokenizer.",
    ),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        help="File of `texts`, one a line. Default: the sentences of the examples; where those are "
        "not installed, the `lognormal` mix."
    ),
]
LoadFormat = Annotated[
    str | None,
    typer.Option(help="`dummy` draws weights at random, for a folder that has none."),
]
SharedPrefix = Annotated[
    int,
    typer.Option(
        min=0,
        help="Tokens that all texts begin with, as with an instruction: plain vLLM and ours keep "
        "them in their caches.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of the texts and the arrivals.")]
Output = Annotated[Path | None, typer.Option(help="File to write the same JSON object to.")]


@app.callback()
def main() -> None:
    """How much faster than plain vLLM: the engine alone, or two servers under load.

    Both compare with the same backbone in the same run, and name the layer limit, which is what
    fewer rows in the upper layers could give at most, but for attention's work in long texts.
    """


# Long because the options of the command are declared here.
@app.command()
def offline(
    model: Model,
    rungs: Annotated[
        str | None,
        typer.Option(help="Only these, as in `merge:2,mux:4`. Default: all of the checkpoint."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Prompts per round.")] = 128,
    rounds: Annotated[int, typer.Option(min=5, help="Rounds after one to warm up.")] = 5,
    lengths: LengthsMix = "texts",
    texts: Texts = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of both engines; `auto` is float32 on CPUs without bfloat16."),
    ] = "auto",
    load_format: LoadFormat = None,
    enforce_eager: Annotated[
        bool,
        typer.Option("--enforce-eager", help="Compile nothing: starts sooner and runs slower."),
    ] = False,
    agreement: Annotated[
        float | None,
        typer.Option(help="Measure this accuracy contract of the checkpoint beside its rungs."),
    ] = None,
    shared_prefix: SharedPrefix = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """The engine alone: every rung against plain vLLM, without HTTP or tokenising.

    A backbone that vLLM alone cannot serve (label words, or a family that it has no class for) is
    compared with itself alone on the same engine.

    Plain vLLM runs as it does by default, its prefix caching too, but no round finds more in the
    cache than the shared prefix.

    Beside the layer limit, which counts rows, stands the speed-up in arithmetic with everything
    counted: attention follows the square of a text's rows, so merging long ones saves more.

    Example: `revmux bench offline revmux-llama --rungs mux:4,merge:2`, with an instruction before
    every text `--shared-prefix 400 --lengths fixed:100`, or over long texts `--lengths fixed:2048
    --requests 16`.
    """
    with measuring():
        require("vllm", extra=EXTRA)
        from revmux_vllm.bench.lengths import Lengths
        from revmux_vllm.bench.offline import run
        from revmux_vllm.bench.settings import OfflineSettings

        settings = OfflineSettings(
            (model,),
            Lengths.parse(lengths),
            rungs=read_rungs(rungs),
            requests=requests,
            rounds=rounds,
            texts=texts,
            dtype=dtype,
            load_format=load_format,
            enforce_eager=enforce_eager,
            seed=seed,
            agreement=agreement,
            shared_prefix=shared_prefix,
        )
        report = {"model": model} | run(settings, make_console(stderr=True))
    _hand_over(report, as_json, output)
    if not as_json:
        from revmux_vllm.bench.tables import offline_table

        make_console().print(offline_table(report))


# Long because the options of the command are declared here.
@app.command()
def online(
    model: Model,
    loads: Annotated[
        str,
        typer.Option(help="Offered loads, as multiples of what plain vLLM answers in a burst."),
    ] = "0.25,0.5,0.75,1,1.5,2,2.5",
    seconds: Annotated[
        float,
        typer.Option(
            help="How long each load arrives, at each server. Answers that come later count as "
            "late, so take 20 times --slo-ms at least."
        ),
    ] = 40,
    arrivals: Annotated[
        str, typer.Option(help="`poisson`, or `bursty` (gamma gaps of shape 0.2).")
    ] = "poisson",
    lengths: LengthsMix = "texts",
    texts: Texts = None,
    slo_ms: Annotated[
        float, typer.Option(help="A load is sustained if 99 of 100 answers come within it.")
    ] = 2000,
    server_args: Annotated[
        str, typer.Option(help="Options of `vllm serve` for both servers, in quotes.")
    ] = "",
    additional_config: Annotated[
        str | None, typer.Option(help="JSON for the RevMUX server alone, as for `vllm serve`.")
    ] = None,
    load_format: LoadFormat = None,
    shared_prefix: SharedPrefix = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write: latency against offered load.")
    ] = None,
) -> None:
    """Two servers, with RevMUX and without, under the same arriving requests.

    The load is `vllm bench serve`, vLLM's own client. The table separates the engine's queue and
    inference from the rest (HTTP, tokenising, the client), and says which was the limit.

    Example: `revmux bench online revmux-llama --loads 0.5,1,2 --arrivals bursty --plot load.png`.
    The default takes about twenty minutes.
    """
    with measuring():
        check_plot(plot)
        drawing = ["matplotlib"] if plot else []
        require("vllm", "httpx", "pandas", *drawing, extra=EXTRA)
        from revmux_vllm.bench.lengths import Lengths
        from revmux_vllm.bench.online import run
        from revmux_vllm.bench.settings import (
            OnlineSettings,
            read_additional_config,
            read_loads,
            read_server_args,
        )
        from revmux_vllm.bench.workload import prepare

        settings = OnlineSettings(
            model,
            loads=read_loads(loads),
            seconds=seconds,
            arrivals=arrivals,
            lengths=Lengths.parse(lengths),
            texts=texts,
            slo_ms=slo_ms,
            server_args=read_server_args(server_args),
            additional_config=read_additional_config(additional_config),
            load_format=load_format,
            seed=seed,
            shared_prefix=shared_prefix,
        )
        report = run(settings, prepare(settings), make_console(stderr=True))
    _hand_over(report, as_json, output)
    if not as_json:
        from revmux_vllm.bench.summary import in_words
        from revmux_vllm.bench.tables import points_table, rungs_table, times_table

        console = make_console()
        for table in (points_table, times_table, rungs_table):
            console.print(table(report))
        console.print("\n".join(in_words(report)), highlight=False)
    if plot is not None:
        from revmux_vllm.bench.plot import plot_load

        with mendable_errors():
            plot_load(report, plot)
        make_console(stderr=True).print(f"plot written to {plot}", soft_wrap=True)


@contextmanager
def measuring() -> Iterator[None]:
    """Standard output is the report's, and what was started is stopped however this ends.

    Where one of those failed, the command ends with its last words.
    """
    with mendable_errors(), unwound_on_sigterm(), redirect_stdout(sys.stderr):
        try:
            yield
        except (MeasuringError, PlainEngineError) as error:
            fail(str(error))


def read_rungs(names: str | None) -> tuple[Rung, ...] | None:
    """``merge:2,mux:4``; None, which means all of the checkpoint, where nothing was given."""
    if names is None:
        return None
    with within("`rungs`"):
        return parse_rungs(name.strip() for name in names.split(","))


def _hand_over(report: dict[str, Any], as_json: bool, output: Path | None) -> None:
    """Write the JSON where it was asked for."""
    if as_json:
        print(json.dumps(report))
    if output is not None:
        with mendable_errors():
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
