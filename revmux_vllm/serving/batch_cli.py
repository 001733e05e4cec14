"""``revmux batch``: the command, its progress and its summary."""

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from revmux_vllm.errors import UserError, require
from revmux_vllm.terminal import AsJson, Watch, fail, make_console, mendable_errors

if TYPE_CHECKING:
    from revmux_vllm.serving.batch import Partition, Run
    from revmux_vllm.serving.batch_ray import Engines

AFTER_A_FAILURE = (
    "The logs of workers are worker-*.err in /tmp/ray/session_latest/logs of their machines. Parts "
    "that are done stay: the same command goes on, with other --llm-args too"
)


# Long because its signature is the command's options, each with its help.
def batch(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Parquet file, or a folder with *.parquet in it."),
    ],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUTPUT", help="Folder for the parts; made if it is not there."),
    ],
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, bundled name or hub id.")
    ] = "revmux-llama",
    text_column: Annotated[str, typer.Option(help="Column that holds the texts.")] = "text",
    prefix: Annotated[
        str, typer.Option(help="Put before `label`, `probability` and `probs` of the output.")
    ] = "",
    rows_per_partition: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rows of one part: what an interruption loses per engine. Thousands, because "
            "an engine packs what waits, and nothing waits at a partition's end.",
        ),
    ] = 2000,
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    cpus_per_replica: Annotated[
        float, typer.Option(help="CPUs of one engine, and threads that it computes with on CPUs.")
    ] = 1.0,
    llm_args: Annotated[
        str,
        typer.Option(
            help='Keyword arguments of vLLM\'s `LLM` as JSON: \'{"dtype": "float32"}\'. '
            "Engines take one GPU each if the cluster has any, or `tensor_parallel_size` of them."
        ),
    ] = "{}",
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, `auto` for this machine's. Default: a new one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Classify the texts of INPUT, in Parquet, and write its rows with their answers to OUTPUT.

    Example: `revmux batch reviews.parquet answers --replicas 2`.
    Interrupted, by Ctrl-C or worse? The same command goes on where it ended.
    """
    console = make_console(stderr=True)
    with mendable_errors():
        require("ray", "pyarrow", extra="ray")
        from revmux_vllm.serving.batch import claimed, describe
        from revmux_vllm.serving.batch_ray import Engines, WorkerFailed

        arguments = read_llm_args(llm_args)
        if source.resolve() == output.resolve():
            what = f"{output} is INPUT too, and parts would become input"
            raise UserError(what, cure="choose another")
        run, partitions = describe(source, model, text_column, rows_per_partition, prefix)
        engines = Engines(replicas, cpus_per_replica, arguments, address)
        try:
            # Ray prints on standard output what becomes of its processes.
            with claimed(output, run), redirect_stdout(sys.stderr):
                summary = work(run, partitions, output.resolve(), engines, console)
        except WorkerFailed as error:
            fail(f"a worker failed: {error}\n{AFTER_A_FAILURE}")
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on where this one ended")
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


def read_llm_args(text: str) -> dict[str, Any]:
    """Raises UserError unless it is a JSON object that leaves the model to ``--model``."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError("`llm_args`", f"not JSON ({error})", found=text) from error
    if not isinstance(values, dict) or "model" in values:
        expected = 'a JSON object without "model", which `model` names, for example '
        expected += """'{"dtype": "float32"}'"""
        raise UserError("`llm_args`", expected=expected, found=text)
    return values


def work(
    run: "Run",
    partitions: "list[Partition]",
    output: Path,
    engines: "Engines",
    console: Console,
) -> dict[str, Any]:
    """Classify what is not there yet; the summary that ``--json`` prints."""
    from revmux_vllm.serving.batch import count_labels, is_done
    from revmux_vllm.serving.batch_ray import classify, ray_cluster

    todo = [partition for partition in partitions if not is_done(partition, output)]
    rows = sum(partition.rows for partition in todo)
    skipped = len(partitions) - len(todo)
    if skipped:
        console.print(f"{skipped} of {len(partitions)} partitions are there already: skipped")
    watch = Watch(console, "rows classified", run.rows, run.rows - rows)
    full, started, first = 0, time.time(), float("inf")
    if todo:
        with ray_cluster(engines.address), watch:
            for done in classify(run, todo, output, engines):
                first = min(first, done["began"])
                full += done["full_length"]
                watch.advance(done["rows"])
    ended = time.time()
    labels = count_labels(partitions, output, run.answer_columns[0])
    no_text = labels.pop(None, 0)
    return {
        "input": run.input,
        "output": str(output),
        "model": run.model,
        "rows": run.rows,
        "partitions": len(partitions),
        "partitions_skipped": skipped,
        "rows_classified": rows,
        "seconds": ended - started,
        "start_s": first - started if todo else 0.0,
        "rows_per_s": rows / (ended - first) if todo else 0.0,
        "labels": dict(labels.most_common()),
        "no_text": no_text,
        "texts_at_full_length": full,
    }


def print_summary(summary: dict[str, Any]) -> None:
    """As a table of labels and a few sentences."""
    console = make_console()
    table = Table("label", "rows")
    table.columns[1].justify = "right"
    for label, rows in summary["labels"].items():
        table.add_row(label, str(rows))
    if summary["no_text"]:
        table.add_row("null (no text)", str(summary["no_text"]), style="dim")
    console.print(table)
    lines = [
        "{rows} rows in {output}; {partitions_skipped} of {partitions} partitions were there.",
        "{rows_classified} rows classified in {seconds:.1f} s: {start_s:.1f} s until the first "
        "engine was ready, then {rows_per_s:.1f} rows/s.",
    ]
    if summary["texts_at_full_length"]:
        lines.append(
            "{texts_at_full_length} texts are as long as the model takes: what was longer was cut."
        )
    console.print("\n".join(lines).format(**summary), highlight=False, soft_wrap=True)
