"""What adapters in bfloat16, as a GPU computes them by default, do to the answers.

The same checkpoint in vLLM twice, its backbone in float32 both times, its adapters in float32 and
in bfloat16; every rung on the same texts, in the same order and so in the same company.

    python benchmarks/adapter_dtype.py revmux-llama --data ../shared/data/sst2/dev.tsv
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from revmux_vllm import bundled
from revmux_vllm.checkpoint import read_config
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.terminal import AsJson
from revmux_vllm.training.data import read_rows


def answers(folder: Path, texts: list[str], dtype: str) -> dict[str, Tensor]:
    """Probabilities (B, C) at every rung, the adapters in ``dtype``."""
    engine = InProcessEngine(
        folder,
        dtype="float32",
        enforce_eager=True,
        additional_config={"revmux": {"adapter_dtype": dtype}},
    )
    try:
        found = {}
        for rung in engine.planner.config.rungs:
            engine.run_at(rung)
            outputs = engine.classify(texts, cut=True)
            found[str(rung)] = torch.tensor([output.outputs.probs for output in outputs])
        return found
    finally:
        engine.close()


def compare(wide: Tensor, narrow: Tensor, labels: Tensor) -> dict[str, float]:
    """Of two times the same answers (B, C), against the true ``labels`` (B,)."""
    difference = (wide - narrow).abs().amax(-1)
    same = wide.argmax(-1) == narrow.argmax(-1)
    return {
        "accuracy_float32": (wide.argmax(-1) == labels).float().mean().item(),
        "accuracy_bfloat16": (narrow.argmax(-1) == labels).float().mean().item(),
        "labels_changed": int((~same).sum()),
        "difference_mean": difference.mean().item(),
        "difference_p99": difference.quantile(0.99).item(),
        "difference_max": difference.max().item(),
    }


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a bundled name.")],
    data: Annotated[Path, typer.Option(help="Labelled rows, as `revmux eval` takes them.")],
    as_json: AsJson = False,
) -> None:
    """Compare answers of adapters in float32 and in bfloat16, at every rung."""
    folder = bundled.resolve(model)
    _, values = read_config(folder)
    names = [values["id2label"][key] for key in sorted(values["id2label"], key=int)]
    rows = read_rows(data, names)
    texts: Any = rows.texts
    wide, narrow = (answers(folder, texts, dtype) for dtype in ("float32", "bfloat16"))
    labels = torch.tensor(rows.labels)
    report = {rung: compare(wide[rung], narrow[rung], labels) for rung in wide}
    if as_json:
        print(json.dumps({"texts": len(rows), "rungs": report}))
        return
    table = Table(title=f"{model}: adapters in float32 and bfloat16, {len(rows)} texts")
    for column in ("rung", "accuracy", "labels changed", "|p - p'| mean", "p99", "max"):
        table.add_column(column, justify="right")
    for rung, one in report.items():
        accuracies = f"{one['accuracy_float32']:.2%}, {one['accuracy_bfloat16']:.2%}"
        spread = (f"{one[f'difference_{key}']:.5f}" for key in ("mean", "p99", "max"))
        table.add_row(rung, accuracies, str(one["labels_changed"]), *spread)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
