"""The ``revmux`` command: joins the rooms' commands. Their imports wait until one runs."""

from typing import Annotated

import typer

from revmux_vllm import __version__
from revmux_vllm.bench.cli import app as bench
from revmux_vllm.inspection import inspect
from revmux_vllm.serving.cli import batch, serve
from revmux_vllm.training.cli import evaluate, train
from revmux_vllm.training.contract_cli import calibrate

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="Adapters that let vLLM classify several requests in one pass.\n\n"
    "`revmux train` makes a checkpoint folder from a frozen classifier, `revmux eval` measures it, "
    "`revmux calibrate` makes it keep an accuracy, `revmux inspect` tells what it is, `vllm serve "
    "FOLDER` serves it, `revmux bench` says how much faster, `revmux serve` runs several engines "
    "behind one address, and `revmux batch` "
    "classifies Parquet files.",
)
app.add_typer(bench, name="bench")
app.command()(serve)
app.command()(batch)
app.command()(train)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(inspect)


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


if __name__ == "__main__":
    app()
