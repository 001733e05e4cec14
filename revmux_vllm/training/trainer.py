"""Fit a ladder of adapters, and the early exits beside it, with transformers' Trainer."""

import errno
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from revmux_vllm.training import work
from revmux_vllm.training.callbacks import JsonLines, Progress, SameOrder
from revmux_vllm.training.device import on_cpu, process_state
from revmux_vllm.training.features import Features
from revmux_vllm.training.ladder_model import LadderModel
from revmux_vllm.training.options import TrainOptions

EVALUATIONS = 10  # how often the held-out rows are asked and a checkpoint is kept
ASKED = 512  # of the held-out rows, every time; the others are for thresholds
PATIENCE = 5  # evaluations without progress until the training stops
FULL_DISK = 64 << 20  # bytes; with less free a failure to write is the disk's


def train(
    model: LadderModel,
    features: Features,
    held_out: Features | None,
    folder: Path,
    options: TrainOptions,
) -> None:
    """Train ``model``'s ladder and exits in place; its backbone stays as it is.

    Batches hold rows of similar length, as the packing serves them; the lengths that they are
    sorted by are blurred, so that unequal partners are met as well.

    Args:
        model: adapters to train, and one early exit per layer of ``features.exits``.
        features: rows to train on.
        held_out: rows that choose the best of the checkpoints and stop the training when it no
            longer gets better; None: train to the end.
        folder: of checkpoints and log; what ``work.unfinished`` finds there is continued.
        options: how.
    """
    progress = Progress()
    callbacks = [JsonLines(folder / work.LOG_FILE), SameOrder(), progress]
    if held_out is not None:
        callbacks.append(EarlyStoppingCallback(PATIENCE))
    trainer = Trainer(
        model=model,
        args=_settings(folder, options, features, held_out),
        train_dataset=_rows_of(features, held_out=False),
        eval_dataset=None if held_out is None else _some(_rows_of(held_out, held_out=True)),
        data_collator=partial(_collate, features, held_out),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    last = work.unfinished(folder)
    if last is not None:
        work.forget_lines(folder, int(last.name.split("-")[1]))
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors meet a full disk
        if shutil.disk_usage(folder).free > FULL_DISK:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
    finally:
        progress.close()
    model.ladder.eval()
    model.exits.eval()


def _rows_of(features: Features, held_out: bool) -> Dataset:
    noise = torch.empty(len(features)).uniform_(0.7, 1.4)
    return Dataset.from_dict(
        {
            "row": list(range(len(features))),
            "length": (features.lengths * noise).long().tolist(),
            "held_out": [held_out] * len(features),
        }
    )


def _some(rows: Dataset) -> Dataset:
    """As many as are asked every time."""
    return rows.shuffle(seed=0).select(range(min(ASKED, len(rows))))


def _collate(
    features: Features, held_out: Features | None, batch: Sequence[dict[str, int]]
) -> dict[str, Tensor | int]:
    """The arguments of ``LadderModel``: hidden is padded, (B, T, D)."""
    own = held_out if batch[0]["held_out"] else features
    assert own is not None
    index = torch.tensor([example["row"] for example in batch])
    return {
        "hidden": own.padded(index),
        "lengths": own.lengths[index],
        "shared": own.shared,
        "labels": own.labels[index],
        "teacher_vectors": own.vectors[index],
        "teacher_logits": own.logits[index],
        "exit_states": own.exits[index].float(),
    }


def _settings(
    folder: Path, options: TrainOptions, features: Features, held_out: Features | None
) -> TrainingArguments:
    recipe, processes = options.recipe, process_state().num_processes
    step = recipe.batch_size * options.gradient_accumulation * processes
    steps_per_epoch = max(1, len(features) // step)
    every = max(1, round(recipe.epochs * steps_per_epoch / EVALUATIONS))
    arguments: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if held_out is not None:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    settings = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=0.06,
        weight_decay=0.01,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=min(recipe.batch_size, len(held_out or features) // processes),
        gradient_accumulation_steps=options.gradient_accumulation,
        bf16=options.bf16,
        use_cpu=on_cpu(),
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        logging_steps=50,
        report_to=[],
        disable_tqdm=True,  # ours in its place
        seed=options.seed,
        **arguments,
    )
    # Several GPUs are for accelerate launch: without it Trainer would copy the adapters to all of
    # them and leave the backbone on the first.
    settings._n_gpu = min(1, settings.n_gpu)
    return settings
