"""Training behind an instruction: what all rows begin with, run once per batch or with every row.

A LLaMA of 12 layers and D=768 with random weights, l=4, `merge:2` and `mux:2`; rows of random words
behind the same instruction. Features (the frozen backbone over all rows) and one training step
(forward and backward over all rows as one batch) take their turns, alternating.
"""

import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from offline import SHAPES, VOCAB_SIZE, write_shape
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.decoder import DecoderBackbone
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import parse_rungs
from revmux_vllm.terminal import AsJson
from revmux_vllm.training import features
from revmux_vllm.training.data import LabelledText
from revmux_vllm.training.ladder_model import LadderModel

RUNGS = parse_rungs(["merge:2", "mux:2"])
PREFILL_LAYERS = 4
ONCE, EACH = "once per batch", "with every row"
LEAST = {ONCE: features.LEAST_SHARED, EACH: 1 << 30}


def make_rows(count: int, instruction: int, own: int) -> LabelledText:
    """So many rows of ``own`` words behind ``instruction`` that all begin with."""
    rng = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{rng.randrange(2, VOCAB_SIZE)}" for _ in range(number))

    start = words(instruction)
    return LabelledText([f"{start} {words(own)}" for _ in range(count)], [0, 1] * (count // 2))


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it gives."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main(
    count: Annotated[int, typer.Option(help="Rows, an even number.")] = 16,
    instruction: Annotated[int, typer.Option(help="Tokens that all begin with.")] = 400,
    own: Annotated[int, typer.Option(help="Tokens behind them.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure both ways; seconds, and how many times faster once is."""
    torch.manual_seed(0)
    model = (
        LlamaForSequenceClassification(LlamaConfig(**SHAPES["llama"])).eval().requires_grad_(False)
    )
    backbone = DecoderBackbone(model, PREFILL_LAYERS)
    config = RevMuxConfig(RUNGS, PREFILL_LAYERS, adapter_hidden_size=256)
    trained = LadderModel(
        backbone, AdapterLadder(config, backbone.hidden_size), nn.ModuleDict(), False
    )
    with tempfile.TemporaryDirectory() as root:
        write_shape(Path(root) / "shape", "llama", PREFILL_LAYERS, RUNGS)
        tokenizer = AutoTokenizer.from_pretrained(Path(root) / "shape")
    rows, every = make_rows(count, instruction, own), torch.arange(count)
    found: dict[str, dict[str, list[float]]] = {w: defaultdict(list) for w in LEAST}

    def step(seen: features.Features) -> None:
        hidden = seen.padded(every)
        teacher = seen.labels, seen.vectors, seen.logits
        trained(hidden, seen.lengths, *teacher, seen.exits.float(), seen.shared)["loss"].backward()
        trained.zero_grad()

    for i in range(rounds + 1):
        for way in sorted(LEAST, reverse=bool(i % 2)):
            features.LEAST_SHARED = LEAST[way]
            taken, seen = seconds(lambda: features.extract(backbone, tokenizer, rows, 512))
            for what, own_s in (("features", taken), ("step", seconds(partial(step, seen))[0])):
                if i:  # the first round warms up
                    found[way][what].append(own_s)
    report = {}
    for what in ("features", "step"):
        ratios = [b / a for a, b in zip(found[ONCE][what], found[EACH][what], strict=True)]
        medians = {way: statistics.median(found[way][what]) for way in LEAST}
        report[what] = {
            "seconds": medians,
            "speedup": medians[EACH] / medians[ONCE],
            "speedup_range": [min(ratios), max(ratios)],
        }
    if as_json:
        print(json.dumps({"rows": count, "instruction": instruction, "own": own} | report))
        return
    table = Table("", ONCE, EACH, "times faster", "lowest to highest")
    for what, row in report.items():
        low, high = row["speedup_range"]
        own_s = [f"{row['seconds'][way]:.2f} s" for way in (ONCE, EACH)]
        table.add_row(what, *own_s, f"{row['speedup']:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
