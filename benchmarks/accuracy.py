"""Accuracy against speed-up: RevMUX, merged tokens, the paper's recipe, and early exit.

One command makes the backbones (``adapters/train_backbone.py``), trains every contender with
``revmux train``, and prints one table; a plot per task lies beside the results. What is finished is
kept in ``--work``, so an interrupted run continues where it stopped; remove a contender's folder
there to train it again with other options.

    python benchmarks/accuracy.py --data ../shared/data --work build/accuracy
    python benchmarks/accuracy.py --data ../shared/data --work build/accuracy --families llama,t5 \\
        --tasks sst2,qnli
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from revmux_vllm.training.plot import plot_frontier

ROOT = Path(__file__).resolve().parent.parent
# Names of the classes (words for the T5) and epochs of MiniLM's fine-tuning.
TASKS = {
    "sst2": ("negative,positive", 1),
    "mrpc": ("different,same", 3),
    "rte": ("yes,no", 3),
    "qnli": ("yes,no", 1),
}
STUDENTS = {"llama": ["--layers", "12"], "t5": ["--layers", "6"]}
CONTENDERS = {
    "default": [],
    "revmux, paper": ["--recipe", "paper"],
    "ora, paper": ["--recipe", "paper", "--adapter-type", "ora"],
    "vanilla, paper": ["--recipe", "paper", "--adapter-type", "vanilla"],
}


def run(*command: str | Path) -> None:
    """A step of the benchmark; its own output goes to standard error."""
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=sys.stderr)


def backbone(family: str, task: str, data: Path, work: Path, epochs: float) -> Path:
    """The folder of a frozen classifier, made if it is not there yet."""
    names, teacher_epochs = TASKS[task]
    script = ROOT / "adapters" / "train_backbone.py"
    folder = work / f"{family}-{task}" / "backbone"
    if (folder / "model.safetensors").is_file():
        return folder
    if family == "bert":
        options = ["--labels", names, "--epochs", str(teacher_epochs)]
        run(script, "teacher", "--data", data / task, "--output", folder, *options)
    else:
        teacher = backbone("bert", task, data, work, epochs)
        options = ["--architecture", family, "--epochs", str(epochs), *STUDENTS[family]]
        where = ["--data", data / task, "--teacher", teacher, "--output", folder]
        run(script, "student", *where, *options)
    return folder


def training_rows(task: str, data: Path, work: Path, most: int | None) -> Path:
    """The file of training rows, or an even sample of ``most`` of them."""
    whole = data / task / "train.tsv"
    if most is None:
        return whole
    sample = work / f"{task}-{most}.tsv"
    if not sample.is_file():
        header, *rows = whole.read_text(encoding="utf-8").splitlines(keepends=True)
        step = max(1.0, len(rows) / most)
        kept = [rows[int(i * step)] for i in range(min(most, len(rows)))]
        work.mkdir(parents=True, exist_ok=True)
        sample.write_text(header + "".join(kept), encoding="utf-8")
    return sample


def measure(
    family: str,
    task: str,
    contender: str,
    rungs: str,
    cut: int,
    rows: Path,
    data: Path,
    work: Path,
    options: list[str],
) -> dict[str, Any]:
    """The report of one ladder, trained on ``rows`` unless it was before."""
    root = work / f"{family}-{task}"
    name = f"{contender}-{rungs}-l{cut}-{rows.stem}"
    folder = root / name.replace(", ", "-").replace(",", "-").replace(":", "")
    report = folder / "report.json"
    if not report.is_file():
        words = ["--label-words", TASKS[task][0]] if family == "t5" else []
        resume = ["--resume"] if (folder / "trainer" / "options.json").is_file() else []
        where = ["--backbone", root / "backbone", "--output", folder, "--prefill-layers", cut]
        files = ["--train", rows, "--eval", data / task / "dev.tsv"]
        more = [*CONTENDERS[contender], *words, *options, *resume]
        run("-m", "revmux_vllm.cli", "train", *where, *files, *more)
    return dict(json.loads(report.read_text(encoding="utf-8")))


def rows_of(
    family: str, task: str, name: str, report: dict[str, Any], exits: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rungs of a report as rows of the result."""
    shared = {"family": family, "task": task, "backbone": report["backbone"]["accuracy"]}
    rows = []
    for rung, row in report["rungs"].items():
        kept = {key: row[key] for key in ("prefill_layers", "speedup", "accuracy", "agreement")}
        early = early_exit_at(exits, report["backbone"]["accuracy"], row["speedup"])
        rows.append(shared | {"contender": name, "rung": rung, "early_exit": early} | kept)
    return rows


def best_exits(reports: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The most accurate early exit of each layer: whatever recipe trained it, it is the rival."""
    best: dict[int, dict[str, Any]] = {}
    for report in reports:
        for row in report["early_exit"]:
            best[row["layer"]] = max(best.get(row["layer"], row), row, key=lambda r: r["accuracy"])
    return best


def early_exit_at(
    exits: dict[int, dict[str, Any]], backbone: float, speedup: float
) -> float | None:
    """Accuracy of early exit at this speed-up, between its two neighbours by cost per sequence."""
    points = [(1.0, backbone)]
    points += [(1 / row["speedup"], row["accuracy"]) for row in exits.values()]
    points.sort()
    cost = 1 / speedup
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= cost <= high:
            return float(below + (above - below) * (cost - low) / (high - low))
    return None


def main(
    data: Annotated[Path, typer.Option(help="Folder with sst2, mrpc, rte, qnli as TSV.")],
    work: Annotated[Path, typer.Option(help="Folder for everything that is made.")],
    tasks: Annotated[str, typer.Option(help="Of sst2, mrpc, rte, qnli.")] = "sst2,mrpc,rte,qnli",
    families: Annotated[str, typer.Option(help="Of bert, llama, t5.")] = "bert",
    contenders: Annotated[str, typer.Option(help="Separated by ;")] = ";".join(CONTENDERS),
    prefill_layers: Annotated[str, typer.Option(help="Cuts l.")] = "1,2,3",
    rungs: Annotated[
        str, typer.Option(help="Rungs of every ladder; the paper's recipe has those of mux alone.")
    ] = "mux:2,mux:4,mux:8,merge:2,merge:3,merge:4",
    epochs: Annotated[
        float, typer.Option(help="Over rows and copies; the paper's recipe, without copies, twice.")
    ] = 2.0,
    most_rows: Annotated[
        int | None,
        typer.Option(help="Train adapters on a sample of so many rows; backbones see all."),
    ] = None,
    student_epochs: Annotated[float, typer.Option(help="Of LLaMA and T5 backbones.")] = 5.0,
    more: Annotated[str, typer.Option(help="More options for `revmux train`.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Train what is missing and print the table."""
    rows: list[dict[str, Any]] = []
    for family in families.split(","):
        for task in tasks.split(","):
            backbone(family, task, data, work, student_epochs)
            train = training_rows(task, data, work, most_rows)
            lines: dict[str, dict[str, Any]] = {}
            for cut in map(int, prefill_layers.split(",")):
                for name in contenders.split(";"):
                    passes = 2 * epochs if "paper" in name else epochs
                    own = [r for r in rungs.split(",") if "paper" not in name or r[:3] == "mux"]
                    options = ["--rungs", ",".join(own), "--epochs", str(passes), *more.split()]
                    line = f"{name}, l={cut}"
                    lines[line] = measure(
                        family, task, name, ",".join(own), cut, train, data, work, options
                    )
            exits = best_exits(list(lines.values()))
            for line, report in lines.items():
                rows += rows_of(family, task, line.rsplit(", ", 1)[0], report, exits)
            plot_frontier(lines, work / f"{family}-{task}.png", f"{task}, {family}")
    if as_json:
        print(json.dumps(rows))
        return
    columns = ("backbone", "task", "adapters", "l", "rung", "speed-up", "accuracy", "agreement")
    table = Table(*columns, "early exit there", "alone")
    for row in rows:
        accuracy, agreement = row["accuracy"], row["agreement"]["mean"]
        early = row["early_exit"]
        table.add_row(
            row["family"],
            row["task"],
            row["contender"],
            str(row["prefill_layers"]),
            row["rung"],
            f"{row['speedup']:.2f}x",
            f"{100 * accuracy['mean']:.1f} "
            f"({100 * accuracy['min']:.1f} to {100 * accuracy['max']:.1f})",
            f"{100 * agreement:.1f}",
            "" if early is None else f"{100 * early:.1f}",
            f"{100 * row['backbone']:.1f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
