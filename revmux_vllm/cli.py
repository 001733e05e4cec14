"""The ``revmux`` command. Heavy imports wait until a command runs, so ``--help`` is quick."""

import json
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from typing import Annotated, Any

import typer
from rich.table import Table

from revmux_vllm import __version__
from revmux_vllm.bench.cli import app as bench
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.serving.cli import serve
from revmux_vllm.terminal import check_plot, make_console, mendable_errors
from revmux_vllm.training.recipes import RECIPES

DEFAULT_RUNGS = "mux:2,mux:4,mux:8"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="Adapters that let vLLM classify several requests in one pass.\n\n"
    "`revmux train` makes a checkpoint folder from a frozen classifier, `revmux eval` measures it, "
    "`revmux inspect` tells what it is, `vllm serve FOLDER` serves it, `revmux bench` says "
    "how much faster, and `revmux serve` runs several engines behind one address.",
)
app.add_typer(bench, name="bench")
app.command()(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")
    ] = False,
) -> None:
    """The options before a command."""


ROWS = "File (.tsv, .csv, .jsonl, .parquet) or hub data set (NAME:SPLIT, NAME:CONFIG:SPLIT)"


def _by_recipe(field: str) -> str:
    """The defaults of an option, for its help."""
    return "Default: " + ", ".join(f"{getattr(r, field):g} ({n})" for n, r in RECIPES.items()) + "."


TextColumns = Annotated[
    str | None,
    typer.Option(help="Column of the text, or two for pairs: `premise,hypothesis`. Default: the "
                 "usual names."),
]  # fmt: skip
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label. Default: `label`.")]
MaxTokens = Annotated[int, typer.Option(help="Longer texts are cut.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Folder = Annotated[Path, typer.Argument(help="Checkpoint folder, or a bundled name.")]


@app.command()
def train(
    backbone: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of a frozen classifier: BERT, RoBERTa, LLaMA, Mistral, "
            "Qwen2 or Qwen3; T5 and causal LMs with --label-words."
        ),
    ],
    train: Annotated[str, typer.Option(help=f"{ROWS}; labels are optional.")],
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    eval: Annotated[
        str | None, typer.Option(help="Rows to measure the result on; never trained on.")
    ] = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    label_words: Annotated[
        str | None,
        typer.Option(
            help="`negative,positive`: the words, one token each and in the order of the "
            "labels, by whose LM-head scores a language model answers."
        ),
    ] = None,
    rungs: Annotated[
        str | None,
        typer.Option(
            help="What the upper layers run on, all trained together: `mux:N` composites of N "
            "sequences, `merge:N` one row per N neighbouring tokens, `merge:M+mux:N` both, "
            "`exit` nothing: an answer from the prefill layers alone. "
            f"Default: `{DEFAULT_RUNGS}`."
        ),
    ] = None,
    widths: Annotated[
        str | None, typer.Option(help="`2,4` is short for --rungs `mux:2,mux:4`.")
    ] = None,
    prefill_layers: Annotated[
        int | None,
        typer.Option(
            help="Layers that every sequence runs by itself: more are surer and slower. "
            "Default: a quarter."
        ),
    ] = None,
    adapter_type: Annotated[
        str, typer.Option(help="`revmux`, or for comparison `ora` or `vanilla`.")
    ] = "revmux",
    adapter_hidden_size: Annotated[
        int, typer.Option(help="Inner width of the demultiplexer.")
    ] = 256,
    recipe: Annotated[
        str,
        typer.Option(
            help="`default`, or the `paper`'s loss and schedule. Sets the defaults "
            "of the next four options."
        ),
    ] = "default",
    epochs: Annotated[
        float | None, typer.Option(help=f"Passes over rows and copies. {_by_recipe('epochs')}")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Peak learning rate. {_by_recipe('learning_rate')}")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Sequences per step and device. {_by_recipe('batch_size')}")
    ] = None,
    augment: Annotated[
        float | None,
        typer.Option(
            help="Spliced, unlabelled copies per row, distilled from the backbone. "
            f"{_by_recipe('copies')}"
        ),
    ] = None,
    hold_out: Annotated[
        float,
        typer.Option(
            help="Share of the training rows that chooses the best checkpoint and stops "
            "early; 0 trains to the end."
        ),
    ] = 0.02,
    max_tokens: MaxTokens = 256,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Automatic mixed precision.")] = False,
    bundle_backbone: Annotated[
        bool,
        typer.Option("--bundle-backbone", help="Copy the backbone into the folder, not its name."),
    ] = False,
    store_dtype: Annotated[
        str,
        typer.Option(
            help="Of the adapters: `float32`, `bfloat16`, `float16`; `auto` is the backbone's. "
            "Serving computes them in it, or in --dtype where that is wider."
        ),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted training.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train adapters for a frozen classifier and write a checkpoint folder.

    Example: `revmux train --backbone my-llama --train train.tsv --eval dev.tsv --output my-revmux`,
    then `vllm serve my-revmux`. On several GPUs:
    `accelerate launch -m revmux_vllm.cli train ...`. `docs/training.md` has more.
    """  # fmt: skip
    with mendable_errors(output):
        _quiet()
        from revmux_vllm.training import run

        if recipe not in RECIPES:
            raise ValueError(f"--recipe {recipe}: expected {' or '.join(RECIPES)}")
        report = run.train_checkpoint(
            backbone,
            train,
            output,
            evaluation=eval,
            text_columns=_split(text_columns),
            label_column=label_column,
            label_words=_split(label_words),
            rungs=_rungs(rungs, widths),
            prefill_layers=prefill_layers,
            adapter_type=adapter_type,
            adapter_hidden_size=adapter_hidden_size,
            recipe=run.with_options(
                RECIPES[recipe],
                epochs=epochs,
                learning_rate=learning_rate,
                batch_size=batch_size,
                copies=augment,
            ),
            max_tokens=max_tokens,
            hold_out=hold_out,
            bundle_backbone=bundle_backbone,
            store_dtype=store_dtype,
            bf16=bf16,
            gradient_accumulation=gradient_accumulation,
            resume=resume,
            seed=seed,
        )
    if report is None:
        return
    console = make_console()
    if report:
        console.print(report_table(report))
    console.print(f"written to {output}; serve it with: vllm serve {output}", soft_wrap=True)


@app.command("eval")
def eval_command(
    folder: Folder,
    eval: Annotated[str, typer.Option(help=f"{ROWS}, with labels.")],
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    window: Annotated[int, typer.Option(help="Requests packed together.")] = 64,
    max_tokens: MaxTokens = 256,
    engine: Annotated[
        bool, typer.Option("--engine", help="Answer through vLLM, not the transformers reference.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write: accuracy against speed-up.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy of every rung over ten shuffled groupings, beside the backbone's own.

    Early exit, the rival that costs less to build, stands in the table and in the plot.
    """
    with mendable_errors(), redirect_stdout(stderr):
        _quiet()
        check_plot(plot)
        from revmux_vllm.training.measure import measure

        report = measure(
            folder,
            eval,
            text_columns=_split(text_columns),
            label_column=label_column,
            window=window,
            max_tokens=max_tokens,
            engine=engine,
        )
    if as_json:
        print(json.dumps(report))
    else:
        console = make_console()
        console.print(report_table(report))
        console.print(class_table(report))
    if plot is not None:
        from revmux_vllm.training.plot import plot_report

        with mendable_errors():
            plot_report(report, plot, folder.name)
        make_console(stderr=True).print(f"plot written to {plot}", soft_wrap=True)


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """What a checkpoint is: backbone, rungs, parameters added, layer limits, accuracies."""
    with mendable_errors():
        from revmux_vllm.inspection import describe

        facts = describe(folder)
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(title=str(folder), show_header=False)
    for key, value in facts.items():
        if not isinstance(value, dict | list) or key == "label_words":
            table.add_row(key.replace("_", " "), _plain(value))
    console = make_console()
    console.print(table)
    rungs = Table()
    for column in ("rung", "limit", "added", "of backbone", "speed-up", "accuracy"):
        rungs.add_column(column, no_wrap=True)
    for rung, row in facts["rungs"].items():
        accuracy = row["accuracy"]
        rungs.add_row(
            rung,
            f"{row['layer_limit']:.2f}x",
            f"{row['parameters']:,}",
            f"{100 * row['parameters_share']:.1f} %",
            f"{row['speedup']:.2f}x" if accuracy else "",
            f"{100 * accuracy['mean']:.1f} %" if accuracy else "not measured",
        )
    console.print(rungs)
    if facts["early_exit"]:
        exits = Table("early exit after layer", "speed-up", "accuracy")
        for row in facts["early_exit"]:
            shares = f"{row['speedup']:.2f}x", f"{100 * row['accuracy']:.1f} %"
            exits.add_row(str(row["layer"]), *shares)
        console.print(exits)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else str(value)


def report_table(report: dict[str, Any]) -> Table:
    """The report as a table, per cent."""
    from revmux_vllm.training.card import COLUMNS, report_rows

    table = Table(title="Ten groupings: mean (lowest to highest), per cent")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in report_rows(report):
        table.add_row(*row)
    return table


def class_table(report: dict[str, Any]) -> Table:
    """Confusion matrix and scores of every class, of the backbone and of every rung."""
    names = report["classes"]
    table = Table(title="By class: scores in per cent, rows answered as each class")
    for column in ("", "class", "precision", "recall", "F1", *(f"as {name}" for name in names)):
        justify: Any = "left" if column in ("", "class") else "right"
        table.add_column(column, justify=justify, no_wrap=column == "")
    rungs = {"backbone": report["backbone"]} | report["rungs"]
    for rung, row in rungs.items():
        for i, name in enumerate(names):
            scores = (f"{100 * row['per_class'][s][i]:.1f}" for s in ("precision", "recall", "f1"))
            counts = (f"{count:.1f}" for count in row["confusion"][i])
            table.add_row(rung if i == 0 else "", name, *scores, *counts)
        table.add_section()
    return table


def _quiet() -> None:
    """Only errors of transformers: its bars and reports are not about the user's work."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _split(words: str | None) -> list[str] | None:
    return None if words is None else words.split(",")


def _rungs(rungs: str | None, widths: str | None) -> tuple[Rung, ...]:
    if rungs and widths:
        raise ValueError("--rungs and --widths: give one of them; --widths is the short form")
    names = [name.strip() for name in (DEFAULT_RUNGS if rungs is None else rungs).split(",")]
    if widths:
        names = [f"mux:{width.strip()}" for width in widths.split(",")]
    try:
        return parse_rungs(names)
    except ValueError as error:
        raise ValueError(f"--widths {widths}: {error}" if widths else f"--rungs: {error}") from None


if __name__ == "__main__":
    app()
