"""What a contract's stops cost by themselves: where nobody leaves at them, and at start-up.

A step: every request is a shadow, so all stops are computed and compared and all run to the end,
against the same engine's backbone alone, in alternating order. Start-up: the checkpoint against
itself without stops, weights drawn at random, each in a process of its own and compiled, by turns;
the first start of each fills the caches and is left out.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from revmux_vllm.bench.lengths import Lengths
from revmux_vllm.bench.offline import at, measure, summary
from revmux_vllm.bench.settings import OfflineSettings
from revmux_vllm.bench.workload import prepare_prompts, read_model
from revmux_vllm.engine.in_process import InProcessEngine, chosen_dtype
from revmux_vllm.rungs import Rung
from revmux_vllm.terminal import AsJson, make_console

START = """
import json, sys, time
from revmux_vllm.engine.in_process import InProcessEngine
began = time.perf_counter()
engine = InProcessEngine(sys.argv[1], **json.loads(sys.argv[2]))
print("seconds", time.perf_counter() - began)
engine.close()
"""


def step_cost(settings: OfflineSettings, agreement: float, progress: Progress) -> dict[str, Any]:
    """Requests per second with every stop and nobody leaving, over those without any."""
    model = read_model(settings.models[0])
    _, prompts = prepare_prompts(settings, model)
    engine = InProcessEngine(
        model.folder,
        dtype=chosen_dtype(settings.dtype),
        max_model_len=max(map(len, prompts)),
        enforce_eager=settings.enforce_eager,
        additional_config={"revmux": {"agreement": agreement, "shadow_rate": 1.0}},
    )
    contenders = {"alone": at(engine, Rung()), "stops": at(engine, Rung(sure=True))}
    rates = measure(contenders, prompts, settings.rounds, progress)
    engine.close()
    return summary(rates["stops"], rates["alone"], 1.0)


def start_up(checkpoint: str, starts: int, progress: Progress) -> dict[str, Any]:
    """Seconds until the engine is there, and the ratio of the medians."""
    folder = read_model(checkpoint).folder
    options = {"dtype": "float32", "load_format": "dummy", "max_model_len": 256}
    seconds: dict[str, list[float]] = {"stops": [], "without": []}
    task = progress.add_task("starting engines", total=2 * (starts + 1))
    with tempfile.TemporaryDirectory() as made:
        without = Path(made, "without")
        shutil.copytree(folder, without)
        config = json.loads((without / "config.json").read_text(encoding="utf-8"))
        own = config["revmux"]
        own["rungs"] = [name for name in own["rungs"] if not Rung.parse(name).stop]
        (without / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (without / "contracts.json").unlink(missing_ok=True)
        for turn in range(starts + 1):
            pairs = [("stops", folder), ("without", without)]
            for name, path in pairs if turn % 2 else reversed(pairs):
                command = [sys.executable, "-c", START, str(path), json.dumps(options)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(
                        f"the engine {name} stops did not start: {done.stderr[-2000:]}"
                    )
                seconds[name].append(float(done.stdout.split("seconds")[-1]))
                progress.advance(task)
    medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
    return {"seconds": seconds, **medians, "ratio": medians["stops"] / medians["without"]}


def main(
    checkpoint: Annotated[str, typer.Argument(help="Folder with a contract, or a bundled name.")],
    agreement: Annotated[float, typer.Option(help="Of the contract.")] = 0.98,
    requests: Annotated[int, typer.Option(help="Prompts of a round.")] = 48,
    rounds: Annotated[int, typer.Option(help="After one to warm up.")] = 7,
    starts: Annotated[int, typer.Option(help="Of each engine, after the first; 0: none.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the engine whose steps are timed.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what stops cost where nobody leaves, and at start-up."""
    settings = OfflineSettings(
        (checkpoint,), Lengths.parse("texts"), None, requests, rounds, None, dtype, None, True
    )
    with Progress(console=make_console(as_json)) as progress:
        found = {"step": step_cost(settings, agreement, progress)}
        if starts:
            found["start"] = start_up(checkpoint, starts, progress)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("", "ratio", "lowest to highest")
    step = found["step"]
    spread = f"{step['ratio_min']:.3f} to {step['ratio_max']:.3f}"
    table.add_row("requests/s with all stops, over none", f"{step['ratio']:.3f}", spread)
    if starts:
        start = found["start"]
        row = f"{start['ratio']:.2f}", f"{start['stops']:.1f} s over {start['without']:.1f} s"
        table.add_row("start-up with stops, over none", *row)
    make_console(False).print(table)


if __name__ == "__main__":
    typer.run(main)
