"""The command ``run.py``: its options, and what it prints."""

import json
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gpu.kit import Kit
from gpu.report import items_table, latency_table, plan_table, throughput_table
from gpu.results import FAIL
from gpu.settings import LENGTHS, STAGES, Settings, read_lengths, read_names
from gpu.shapes import RUNGS, SHAPES
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.terminal import make_console, mendable_errors, unwound_on_sigterm


def run(settings: Settings, command: str) -> dict[str, Any]:
    """All that ``settings`` ask for, shown on standard error. Returns the report."""
    console = make_console(stderr=True)
    planned = settings.planned_s(settings.shapes_on(is_gpu=True))
    console.print(plan_table(planned, settings.minutes))
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "settings": asdict(settings) | {"rungs": [str(rung) for rung in settings.rungs]},
    }
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with unwound_on_sigterm(), Progress(*columns, console=console) as progress:
        kit = Kit(settings, facts, progress)
        kit.run()
    return kit.report()


def read_rungs(text: str) -> tuple[Rung, ...]:
    """``mux:2,merge:2``."""
    return parse_rungs(read_names(text))


# Long because every option is a parameter, with its help beside it.
def main(
    stages: Annotated[
        str,
        typer.Option(help="Some of them, to split the kit over several calls."),
    ] = ",".join(STAGES),
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(SHAPES)}. Default: 0.1b,1b,8b on a GPU, tiny on a CPU."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = ",".join(
        map(str, LENGTHS)
    ),
    rungs: Annotated[str, typer.Option(help="That are measured, beside alone and load.")] = (
        ",".join(map(str, RUNGS))
    ),
    rounds: Annotated[
        int, typer.Option(min=1, help="Of throughput, after one to warm up; 5 for numbers.")
    ] = 5,
    latency_seconds: Annotated[
        float, typer.Option(min=0.1, help="That each engine is offered a quarter load, twice.")
    ] = 10.0,
    memory_share: Annotated[
        float,
        typer.Option(
            help="Of the GPU's memory for each of two engines: RevMUX's and plain vLLM's of a "
            "shape are up together. Each holds the weights (15 GB at 8b in bfloat16)."
        ),
    ] = 0.45,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Start nothing later and cut what runs; for a time limit."),
    ] = None,
    enforce_eager: Annotated[
        bool,
        typer.Option("--enforce-eager", help="Neither compile nor capture CUDA graphs."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of report.json, report.md and the logs of all processes.")
    ] = Path("gpu-report"),
    as_json: Annotated[
        Path | None, typer.Option("--json", help="File to write the JSON to as well.")
    ] = None,
) -> None:
    """Try RevMUX on this machine's GPU, and measure it against plain vLLM.

    In this order: check (imports, versions, device, plugin), parity with the reference in float32
    and bfloat16, the sync check, throughput of plain vLLM against every rung, latency at a quarter
    load. An item that fails stops no other; the report is written after every item. The status is 1
    if one failed, and 2 for an option that cannot work.

    Where a call is limited to ten minutes, two of them: `--shapes 0.1b --minutes 9.5`, then
    `--stages throughput,latency --shapes 1b,8b --minutes 9.5`.

    Without one: `--shapes tiny --enforce-eager` goes through every line of it in minutes.
    """
    with mendable_errors():
        settings = Settings(
            stages=read_names(stages),
            shapes=None if shapes is None else read_names(shapes),
            lengths=read_lengths(lengths),
            rungs=read_rungs(rungs),
            rounds=rounds,
            latency_s=latency_seconds,
            memory_share=memory_share,
            minutes=minutes,
            enforce_eager=enforce_eager,
            seed=seed,
            out=out.resolve(),
        )
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        report = run(settings, shlex.join(["python", "benchmarks/gpu/run.py", *words[1:]]))
        if as_json is not None:
            as_json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    console = make_console()
    for table in (items_table(report), throughput_table(report), latency_table(report)):
        if table.row_count:
            console.print(table)
    console.print(f"{settings.out / 'report.md'} is ready to paste", highlight=False)
    if any(item["status"] == FAIL for item in report["items"]):
        raise typer.Exit(1)
