"""``revmux bench``: the options of its two commands. What they need is imported when they run."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.terminal import (
    check_plot,
    make_console,
    mendable_errors,
    unwound_on_sigterm,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a bundled name.")]
LengthsMix = Annotated[
    str,
    typer.Option(
        "--lengths",
        help="Of the texts: `texts` from a file, `fixed:N` tokens each, or `lognormal` (median 33 "
        "tokens, sigma 0.8). The last two are made of words of the model's tokenizer.",
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
Seed = Annotated[int, typer.Option(help="Of the texts and the arrivals.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Output = Annotated[Path | None, typer.Option(help="File to write the same JSON object to.")]


@app.callback()
def main() -> None:
    """How much faster than plain vLLM: the engine alone, or two servers under load.

    Both compare with the same backbone in the same run, and name the layer limit, which is what
    fewer rows in the upper layers could give at most.
    """


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
    seed: Seed = 0,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """The engine alone: every rung against plain vLLM, without HTTP or tokenising.

    Example: `revmux bench offline revmux-llama --rungs mux:4,merge:2`.
    """
    with _measuring():
        from transformers import AutoTokenizer

        from revmux_vllm.bench import settings
        from revmux_vllm.bench.lengths import Lengths, choose_texts, make_prompts
        from revmux_vllm.bench.offline import compare, schedule_in_this_process

        _require("vllm")
        schedule_in_this_process()
        mix, file = choose_texts(Lengths.parse(lengths), texts)
        folder, config, values = settings.read_model(model, load_format)
        chosen = _own_rungs(rungs, config.rungs)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        most = settings.most_tokens(folder, tokenizer)
        report = compare(
            folder,
            config,
            values,
            make_prompts(tokenizer, mix, most, seed, file, requests),
            rungs=chosen,
            rounds=rounds,
            console=make_console(stderr=True),
            dtype=_dtype(dtype),
            load_format=load_format or "auto",
            enforce_eager=enforce_eager,
        )
    report = {"model": model, "lengths": str(mix)} | report
    _hand_over(report, as_json, output)
    if not as_json:
        from revmux_vllm.bench.tables import offline_table

        make_console().print(offline_table(report))


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
    with _measuring():
        check_plot(plot)
        _require("vllm", "pandas", *(["matplotlib"] if plot else []))
        from revmux_vllm.bench.lengths import Lengths
        from revmux_vllm.bench.settings import (
            Settings,
            prepare,
            read_additional_config,
            read_loads,
            read_server_args,
        )

        settings = Settings(
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
        )
        workload = prepare(settings)
        from revmux_vllm.bench.online import ClientError, ServerError, run

        try:
            report = run(settings, workload, make_console(stderr=True))
        except (ClientError, ServerError) as error:
            raise ValueError(str(error)) from error
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
def _measuring() -> Iterator[None]:
    """Standard output is the report's, and what was started is stopped however this ends."""
    with mendable_errors(), unwound_on_sigterm(), redirect_stdout(sys.stderr):
        yield


def _require(*modules: str) -> None:
    """Raise ValueError before any server starts for what is not installed."""
    cures = {"vllm": "tools/install.sh installs vLLM"}
    for name in modules:
        if find_spec(name) is None:
            cure = cures.get(name, "in a clone of this repository `pip install -e '.[train]'` does")
            raise ValueError(f"{name} is not installed; {cure}")


def _own_rungs(names: str | None, own: tuple[Rung, ...]) -> tuple[Rung, ...]:
    """The rungs that ``names`` names, of the checkpoint's ``own``."""
    if names is None:
        return own
    try:
        chosen = parse_rungs(name.strip() for name in names.split(","))
    except ValueError as error:
        raise ValueError(f"--rungs: {error}") from None
    if missing := [str(rung) for rung in chosen if rung not in own]:
        raise ValueError(
            f"--rungs: the checkpoint has no {', '.join(missing)}; it has "
            + ", ".join(map(str, own))
        )
    return chosen


def _dtype(name: str) -> str:
    from revmux_vllm.engine.bundled_names import native_dtype

    return native_dtype() if name == "auto" else name


def _hand_over(report: dict[str, Any], as_json: bool, output: Path | None) -> None:
    """Write the JSON where it was asked for."""
    if as_json:
        print(json.dumps(report))
    if output is not None:
        with mendable_errors():
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
