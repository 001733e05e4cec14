"""The ``revmux`` command. Heavy imports wait until a command runs, so ``--help`` is quick."""

import json
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="Adapters that let vLLM classify several requests in one pass.\n\n"
    "`revmux train` makes a checkpoint folder from a frozen classifier, `revmux eval` measures it, "
    "`vllm serve FOLDER` serves it.",
)


@app.command()
def train(
    backbone: Annotated[
        Path, typer.Option(help="Folder of a transformers LlamaForSequenceClassification.")
    ],
    train: Annotated[Path, typer.Option(help="TSV: label, text (or text_a, text_b).")],
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    eval: Annotated[
        Path | None, typer.Option(help="TSV to measure the result on; never trained on.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Streams per composite, comma-separated.")] = "2,4",
    prefill_layers: Annotated[
        int | None,
        typer.Option(help="Layers that every sequence runs by itself. Default: a quarter."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over rows and copies.")] = 2.0,
    augment: Annotated[
        float, typer.Option(help="Spliced, unlabelled copies per row, distilled from the backbone.")
    ] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (cosine).")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 256,
    adapter_hidden_size: Annotated[int, typer.Option(help="Inner width of the adapters.")] = 256,
    skip_dropout: Annotated[
        float, typer.Option(help="Share of members that train without their skip connection.")
    ] = 0.5,
    bundle_backbone: Annotated[
        bool, typer.Option(help="Copy the backbone into the folder instead of naming it.")
    ] = False,
    store_dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train adapters for a frozen classifier and write a checkpoint folder.

    Example: `revmux train --backbone my-llama --train train.tsv --eval dev.tsv --output my-revmux`,
    then `vllm serve my-revmux`.
    """
    try:
        ladder_widths = tuple(int(width) for width in widths.split(","))
    except ValueError:
        _fail(f"--widths {widths}: expected integers such as 2,4,8")
    try:
        import torch
        from transformers import AutoConfig, AutoTokenizer, set_seed

        from revmux_vllm import checkpoint
        from revmux_vllm.adapters import AdapterLadder
        from revmux_vllm.backbones import LlamaBackbone
        from revmux_vllm.config import RevMuxConfig
        from revmux_vllm.training import data, features, trainer
        from revmux_vllm.training.card import model_card
        from revmux_vllm.training.evaluate import evaluate
    except ImportError as error:
        _fail(f"{error}; install what training needs: pip install 'revmux-vllm[train]'")
    try:
        if store_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--store-dtype {store_dtype}: expected float32, bfloat16 or float16")
        if not (backbone / "config.json").is_file():
            raise ValueError(f"--backbone {backbone}: expected a folder with a config.json")
        hf_config = AutoConfig.from_pretrained(backbone)
        if hf_config.model_type not in checkpoint.ARCHITECTURES:
            raise ValueError(
                f"--backbone {backbone}: model_type {hf_config.model_type!r}; supported are "
                + ", ".join(checkpoint.ARCHITECTURES)
            )
        layers = hf_config.num_hidden_layers
        config = RevMuxConfig(
            widths=ladder_widths,
            prefill_layers=prefill_layers if prefill_layers is not None else max(1, layers // 4),
            adapter_hidden_size=adapter_hidden_size,
        )
        config.check_backbone(hf_config.hidden_size, layers)
        train_rows = data.read_tsv(train, hf_config.num_labels)
        train_rows = data.with_spliced_copies(train_rows, augment, seed)
        eval_rows = data.read_tsv(eval, hf_config.num_labels) if eval else None
        if batch_size % ladder_widths[-1] or len(train_rows.labels) < batch_size:
            raise ValueError(
                f"--batch-size {batch_size}: expected a multiple of the widest width "
                f"{ladder_widths[-1]} and at most the {len(train_rows.labels)} training rows"
            )
    except ValueError as error:
        _fail(str(error))

    set_seed(seed)
    cut = LlamaBackbone.from_folder(backbone, config.prefill_layers)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    ladder = AdapterLadder(config, hf_config.hidden_size)
    early = trainer.EarlyExit(hf_config.hidden_size, adapter_hidden_size, hf_config.num_labels)
    trainer.train(
        cut,
        ladder,
        early,
        features.extract(cut, tokenizer, train_rows, max_tokens),
        output / "trainer",
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        skip_dropout=skip_dropout,
        seed=seed,
    )
    dtype = getattr(torch, store_dtype)
    ladder.to(dtype).float()  # measured as stored
    report: dict[str, Any] = {}
    if eval_rows is not None:
        measured = features.extract(cut, tokenizer, eval_rows, max_tokens)
        report = evaluate(cut, ladder, measured) | {
            "early_exit": trainer.measure_exit(early, measured, config.prefill_layers)
        }
    card = model_card(output.name, config, layers, report)
    checkpoint.save(output, ladder, backbone, card, bundle_backbone=bundle_backbone, dtype=dtype)
    console = Console()
    if report:
        console.print(report_table(report, layers))
    console.print(f"written to {output}; serve it with: vllm serve {output}")


@app.command("eval")
def eval_command(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, or a bundled name.")],
    eval: Annotated[Path, typer.Option(help="TSV: label, text (or text_a, text_b).")],
    window: Annotated[int, typer.Option(help="Requests packed together.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 256,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output.")
    ] = False,
) -> None:
    """Accuracy of every width over ten shuffled groupings, beside the backbone's own."""
    with redirect_stdout(stderr):
        from transformers import AutoTokenizer

        from revmux_vllm import bundled, checkpoint
        from revmux_vllm.backbones import LlamaBackbone
        from revmux_vllm.training import data, features
        from revmux_vllm.training.evaluate import evaluate

        try:
            folder = bundled.resolve(folder)
            ladder = checkpoint.load_adapters(folder).float()
            _, values = checkpoint.read_config(folder)
            cut = LlamaBackbone.from_folder(
                checkpoint.backbone_folder(folder), ladder.config.prefill_layers
            )
            rows = data.read_tsv(eval, cut.num_labels)
        except ValueError as error:
            _fail(str(error))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        report = evaluate(cut, ladder, features.extract(cut, tokenizer, rows, max_tokens), window)
    if as_json:
        print(json.dumps(report))
    else:
        Console().print(report_table(report, values["num_hidden_layers"]))


def report_table(report: dict[str, Any], num_layers: int) -> Table:
    """The report as a table, per cent."""
    from revmux_vllm.training.card import COLUMNS, report_rows

    table = Table(title="Ten groupings: mean (lowest to highest), per cent")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in report_rows(report, num_layers):
        table.add_row(*row)
    return table


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False)
    raise typer.Exit(2)
