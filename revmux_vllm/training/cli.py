"""``revmux train`` and ``revmux eval``: their options. What they need is imported when they run."""

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from typing import Annotated

import typer

from revmux_vllm.errors import UserError, require, within
from revmux_vllm.families import FAMILIES
from revmux_vllm.rungs import Rung, in_words, parse_rungs
from revmux_vllm.terminal import AsJson, Folder, check_plot, make_console, mendable_errors
from revmux_vllm.training.options import AUTO, TrainOptions
from revmux_vllm.training.recipes import RECIPES
from revmux_vllm.training.tables import class_table, report_tables

RESUME = "An unfinished training keeps its last checkpoint: --resume continues it"
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
MaxTokens = Annotated[
    int, typer.Option(help="Longer texts are cut; the checkpoint remembers where.")
]
AsTrained = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Longer texts are cut. Default: where training cut them."),
]


# Long because it declares twenty-odd options with their help; it only reads them.
def train(
    backbone: Annotated[
        str,
        typer.Option(
            help=f"Folder or hub id of a frozen classifier ({', '.join(FAMILIES)}), or of a "
            "language model with --label-words."
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
    score_template: Annotated[
        Path | None,
        typer.Option(
            help="For a reranker that answers no or yes (--label-words `no,yes`): Jinja file that "
            "makes one text of messages[0].content, the query, and messages[1].content, the "
            "document."
        ),
    ] = None,
    rungs: Annotated[
        str,
        typer.Option(
            help=f"What the upper layers run on, all trained together: {in_words()}. "
            "`auto`: proposed by early exits that are tried on a sample of the rows."
        ),
    ] = AUTO,
    widths: Annotated[
        str | None, typer.Option(help="`2,4` is short for --rungs `mux:2,mux:4`.")
    ] = None,
    prefill_layers: Annotated[
        str,
        typer.Option(
            help="Layers that every sequence runs by itself: more are surer and slower. `auto`: "
            "the last one that does not know the task yet, by the same early exits."
        ),
    ] = AUTO,
    adapter_type: Annotated[
        str, typer.Option(help="`revmux`, or for comparison `ora` or `vanilla`.")
    ] = TrainOptions.adapter_type,
    adapter_hidden_size: Annotated[
        int, typer.Option(help="Inner width of the demultiplexer.")
    ] = TrainOptions.adapter_hidden_size,
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
    ] = TrainOptions.hold_out,
    validation: Annotated[
        str | None,
        typer.Option(
            help="Rows that do so in place of a share, and set the thresholds of the cascade: best "
            "such that the backbone was not trained on."
        ),
    ] = None,
    max_tokens: MaxTokens = TrainOptions.max_tokens,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches per step.")
    ] = TrainOptions.gradient_accumulation,
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
    ] = TrainOptions.store_dtype,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted training.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = TrainOptions.seed,
) -> None:
    """Train adapters for a frozen classifier and write a checkpoint folder.

    Example: `revmux train --backbone my-llama --train train.tsv --eval dev.tsv --output my-revmux`,
    then `vllm serve my-revmux`. On several GPUs:
    `accelerate launch -m revmux_vllm.cli train ...`. `docs/training.md` has more.
    """
    with mendable_errors(_how_to_go_on(output)):
        require("accelerate", "datasets", "psutil", extra="train")
        if eval is not None:
            require("matplotlib", "sklearn", extra="train")
        if recipe not in RECIPES:
            raise UserError("`recipe`", expected=" or ".join(RECIPES), found=recipe)
        options = TrainOptions(
            backbone,
            train,
            output,
            eval=eval,
            text_columns=split(text_columns),
            label_column=label_column,
            label_words=split(label_words),
            score_template=_read(score_template),
            rungs=_rungs(rungs, widths),
            prefill_layers=_prefill_layers(prefill_layers),
            adapter_type=adapter_type,
            adapter_hidden_size=adapter_hidden_size,
            recipe=RECIPES[recipe].with_given(
                epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, copies=augment
            ),
            max_tokens=max_tokens,
            hold_out=hold_out,
            validation=validation,
            bundle_backbone=bundle_backbone,
            store_dtype=store_dtype,
            bf16=bf16,
            gradient_accumulation=gradient_accumulation,
            seed=seed,
        )
        quiet()
        from revmux_vllm.training.run import train_checkpoint

        report = train_checkpoint(options, resume)
    if report is None:
        return
    console = make_console()
    if report:
        console.print(*report_tables(report))
    console.print(f"written to {output}; serve it with: vllm serve {output}", soft_wrap=True)


def evaluate(
    folder: Folder,
    eval: Annotated[str, typer.Option(help=f"{ROWS}, with labels.")],
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    window: Annotated[int, typer.Option(help="Requests packed together.")] = 64,
    max_tokens: AsTrained = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Answer through vLLM, not the transformers reference.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write: accuracy against speed-up.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep it in the checkpoint: servers go by it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy of every rung over ten shuffled groupings, beside the backbone's own.

    Early exit, the alternative that costs less to build, stands in the table and in the plot.
    """
    with mendable_errors(), redirect_stdout(stderr):
        require("accelerate", "psutil", "sklearn", extra="train")
        check_plot(plot)
        if plot is not None or save:
            require("matplotlib", extra="train")
        quiet()
        from revmux_vllm.training.measure import measure

        report = measure(
            folder,
            eval,
            text_columns=split(text_columns),
            label_column=label_column,
            window=window,
            max_tokens=max_tokens,
            engine=engine,
            save=save,
        )
    if as_json:
        print(json.dumps(report))
    else:
        console = make_console()
        console.print(*report_tables(report))
        if (by_class := class_table(report)) is not None:
            console.print(by_class)
    if plot is not None:
        from revmux_vllm.training.plot import plot_report

        with mendable_errors():
            plot_report(report, plot, folder.name)
        make_console(stderr=True).print(f"plot written to {plot}", soft_wrap=True)


def _how_to_go_on(output: Path) -> Callable[[], str]:
    """Advice where a training into ``output`` stopped half way."""

    def advice() -> str:
        from revmux_vllm.training import work

        return RESUME if work.unfinished(work.folder_in(output)) else ""

    return advice


def quiet() -> None:
    """Only errors of transformers: its bars and reports are not about the user's work."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def split(words: str | None) -> tuple[str, ...] | None:
    return None if words is None else tuple(words.split(","))


def _read(path: Path | None) -> str | None:
    return None if path is None else path.read_text(encoding="utf-8")


def _prefill_layers(value: str) -> int | None:
    if value == AUTO:
        return None
    if not value.isdecimal():
        raise UserError("`prefill_layers`", expected=f"a number, or {AUTO}", found=value)
    return int(value)


def _rungs(rungs: str, widths: str | None) -> tuple[Rung, ...] | None:
    if rungs != AUTO and widths:
        cure = "`widths` is the short form"
        raise UserError("`rungs` and `widths`", "give one of them", cure=cure)
    if widths:
        with within(f"`widths` {widths}"):
            return parse_rungs(f"mux:{width.strip()}" for width in widths.split(","))
    if rungs == AUTO:
        return None
    with within("`rungs`"):
        return parse_rungs(name.strip() for name in rungs.split(","))
