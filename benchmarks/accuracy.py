"""Accuracy against speed-up: RevMUX, merged tokens, the paper's recipe, and early exit.

One command makes the backbones (``train_backbone.py`` beside this), trains every contender with
``revmux train``, and prints one table; two plots per task lie beside the results, without the
paper's recipe and with it. What is finished is kept in ``--work`` and stands in every later table
and plot, so a run can be interrupted, or made of several commands; remove a contender's folder
there to train it again with other options.

    python benchmarks/accuracy.py --data ../shared/data --work build/accuracy
    python benchmarks/accuracy.py --data ../shared/data --work build/accuracy --families llama,t5 \\
        --tasks sst2,qnli
"""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from revmux_vllm.checkpoint import WORK_FOLDER
from revmux_vllm.terminal import AsJson
from revmux_vllm.training.plot import best_exits, plot_frontier
from revmux_vllm.training.tables import span
from revmux_vllm.training.work import OPTIONS_FILE

# Names of the classes (words for the T5) and epochs of MiniLM's fine-tuning.
TASKS = {
    "sst2": ("negative,positive", 2),
    "mrpc": ("different,same", 5),
    "rte": ("yes,no", 10),
    "qnli": ("yes,no", 3),
}
SHARES = ("accuracy", "agreement")
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


@dataclass(frozen=True)
class Ladders:
    """The ladders over one backbone; what is not there yet is made.

    Attributes:
        data: folder of the tasks' data.
        work: folder for everything that is made.
        family: of the backbone.
        task: its task.
        student_epochs: of a LLaMA or T5 backbone.
    """

    data: Path
    work: Path
    family: str
    task: str
    student_epochs: float

    @property
    def root(self) -> Path:
        """Where they lie."""
        return self.work / f"{self.family}-{self.task}"

    def backbone(self) -> Path:
        """The folder of the frozen classifier."""
        names, teacher_epochs = TASKS[self.task]
        script = Path(__file__).with_name("train_backbone.py")
        folder = self.root / "backbone"
        if (folder / "model.safetensors").is_file():
            return folder
        where = ["--data", self.data / self.task, "--output", folder]
        if self.family == "bert":
            run(script, "teacher", *where, "--labels", names, "--epochs", str(teacher_epochs))
        else:
            teacher = replace(self, family="bert").backbone()
            options = ["--architecture", self.family, "--epochs", str(self.student_epochs)]
            run(script, "student", *where, "--teacher", teacher, *options, *STUDENTS[self.family])
        return folder

    def rows(self, part: str, most: int | None) -> Path:
        """The file of train or dev rows, or an even sample of ``most`` of them."""
        whole = self.data / self.task / f"{part}.tsv"
        header, *rows = whole.read_text(encoding="utf-8").splitlines(keepends=True)
        if most is None or most >= len(rows):
            return whole
        sample = self.work / f"{self.task}-{part}-{most}.tsv"
        kept = [rows[i * len(rows) // most] for i in range(most)]
        sample.parent.mkdir(parents=True, exist_ok=True)
        sample.write_text(header + "".join(kept), encoding="utf-8")
        return sample

    def train(
        self, contender: str, cut: int, rows: Path, dev: Path, rungs: str, options: list[str]
    ) -> None:
        """Train one ladder on ``rows`` and measure it on ``dev``, unless it was before."""
        name = f"{contender}_l={cut}_{rows.stem}_{rungs}"
        folder = self.root / name.replace(", ", "-").replace(",", "-").replace(":", "")
        if (folder / "report.json").is_file():
            return
        words = ["--label-words", TASKS[self.task][0]] if self.family == "t5" else []
        resume = ["--resume"] if (folder / WORK_FOLDER / OPTIONS_FILE).is_file() else []
        where = ["--backbone", self.backbone(), "--output", folder, "--prefill-layers", cut]
        files = ["--train", rows, "--eval", dev, "--rungs", rungs]
        more = [*CONTENDERS[contender], *words, *options, *resume]
        run("-m", "revmux_vllm.cli", "train", *where, *files, *map(str, more))

    def reports(self) -> dict[str, dict[str, Any]]:
        """Of every ladder there is: contender, cut and rows, to what ``revmux eval`` says."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.root.glob("*/report.json")):
            name = ", ".join(path.parent.name.split("_")[:3])
            report = json.loads(path.read_text(encoding="utf-8"))
            if name in found:  # the same with other rungs
                found[name]["rungs"] |= report["rungs"]
                found[name]["early_exit"] += report["early_exit"]
            found.setdefault(name, report)
        return found


def rows_of(
    ladders: Ladders, name: str, report: dict[str, Any], exits: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rungs of a report as rows of the result."""
    shared = {"family": ladders.family, "task": ladders.task, "contender": name}
    shared |= {"backbone": report["backbone"]["accuracy"]}
    rows = []
    for rung, row in report["rungs"].items():
        kept = {key: row[key] for key in ("prefill_layers", "speedup", *SHARES)}
        early = early_exit_at(exits, report["backbone"]["accuracy"], row["speedup"])
        rows.append(shared | {"rung": rung, "early_exit": early} | kept)
    return rows


def exit_rows(
    ladders: Ladders, backbone: float, exits: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The best early exit after each layer, as rows of the result."""
    shared = {"family": ladders.family, "task": ladders.task, "contender": "early exit"}
    return [
        shared
        | {"rung": "", "backbone": backbone, "early_exit": row["accuracy"]}
        | {"prefill_layers": layer, "speedup": row["speedup"]}
        | {key: dict.fromkeys(("mean", "min", "max"), row[key]) for key in SHARES}
        for layer, row in exits.items()
    ]


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
    most_dev_rows: Annotated[
        int | None, typer.Option(help="Measure on a sample of so many rows.")
    ] = None,
    student_epochs: Annotated[float, typer.Option(help="Of LLaMA and T5 backbones.")] = 5.0,
    more: Annotated[str, typer.Option(help="More options for `revmux train`.")] = "",
    as_json: AsJson = False,
) -> None:
    """Train what is missing, and print the table of everything there is under ``--work``."""
    result: list[dict[str, Any]] = []
    for family, task in itertools.product(families.split(","), tasks.split(",")):
        ladders = Ladders(data, work, family, task, student_epochs)
        rows, dev = ladders.rows("train", most_rows), ladders.rows("dev", most_dev_rows)
        for cut, name in itertools.product(
            map(int, prefill_layers.split(",")), contenders.split(";")
        ):
            paper = "paper" in name
            own = [r for r in rungs.split(",") if not paper or r.startswith("mux:")]
            if not own:
                continue
            options = ["--epochs", str(2 * epochs if paper else epochs), *more.split()]
            ladders.train(name, cut, rows, dev, ",".join(own), options)
        result += collect(ladders)
    if as_json:
        print(json.dumps(result))
    else:
        Console(width=140).print(result_table(result))


def collect(ladders: Ladders) -> list[dict[str, Any]]:
    """Everything there is of one backbone as rows of the result; draws its two plots."""
    reports = ladders.reports()
    exits = best_exits(reports.values())
    rows = [
        row for name, report in reports.items() for row in rows_of(ladders, name, report, exits)
    ]
    rows += exit_rows(ladders, next(iter(reports.values()))["backbone"]["accuracy"], exits)
    title, plot = f"{ladders.task}, {ladders.family}", f"{ladders.family}-{ladders.task}"
    own = [name for name in reports if "paper" not in name]
    plot_frontier(reports, ladders.work / f"{plot}.png", title, own)
    plot_frontier(reports, ladders.work / f"{plot}-paper.png", title)
    return rows


def result_table(result: list[dict[str, Any]]) -> Table:
    """The result, per cent, for a terminal."""
    columns = ("backbone", "task", "adapters", "l", "rung", "speed-up", "accuracy", "agreement")
    table = Table(*columns, "early exit there", "alone")
    for row in result:
        accuracy, agreement = row["accuracy"], row["agreement"]["mean"]
        early = row["early_exit"]
        table.add_row(
            row["family"],
            row["task"],
            row["contender"],
            str(row["prefill_layers"]),
            row["rung"],
            f"{row['speedup']:.2f}x",
            span(accuracy),
            f"{100 * agreement:.1f}",
            "" if early is None else f"{100 * early:.1f}",
            f"{100 * row['backbone']:.1f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
