"""Train a ladder of adapters, and beside it the early exits that it has to beat."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.backbones import Backbone
from revmux_vllm.reference import demultiplex, exit_vectors, multiplex
from revmux_vllm.training.callbacks import JsonLines, Progress, SameOrder
from revmux_vllm.training.device import on_cpu, process_state
from revmux_vllm.training.features import Features
from revmux_vllm.training.losses import (
    answer_loss,
    info_nce,
    random_groups,
    stream_similarity,
    vector_loss,
)
from revmux_vllm.training.recipes import Recipe

LOG_FILE = "log.jsonl"
OPTIONS_FILE = "options.json"
FULL_DISK = 64 << 20  # bytes; with less free a failure to write is the disk's


class LadderModel(nn.Module):
    """What ``Trainer`` trains: the loss of every rung, and of every early exit, on one batch.

    The frozen backbone is used but is not a submodule: it is neither saved nor wrapped.

    Args:
        backbone: cut as ``ladder`` wants it.
        ladder: the adapters.
        exits: one head per layer of ``Features.exits``, in that order, by the layer's number.
        paper_loss: see ``Recipe``.
    """

    def __init__(
        self, backbone: Backbone, ladder: AdapterLadder, exits: nn.ModuleDict, paper_loss: bool
    ) -> None:
        super().__init__()
        self.ladder, self.exits = ladder, exits
        self.paper_loss = paper_loss
        self._frozen = (backbone,)
        # The paper's weights of InfoNCE: BERT, and LLaMA and T5.
        self.nce_weight = 0.25 if backbone.config.model_type == "bert" else 0.5

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LadderModel":
        self.backbone._apply(fn)  # type: ignore[no-untyped-call]  # goes where the adapters go
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden: Tensor,
        lengths: Tensor,
        labels: Tensor,
        teacher_vectors: Tensor,
        teacher_logits: Tensor,
        exit_states: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of a padded batch; shapes as in ``Features``, ``hidden`` (B, T, D).

        While measuring, early exits are left out: the best checkpoint is the adapters' best.
        """
        losses = {}
        for rung, adapter in self.ladder.items():
            group = self._groups(lengths, rung.mux)
            own, own_lengths, rows = hidden[group], lengths[group], group.flatten()
            target = labels[rows], teacher_logits[rows], teacher_vectors[rows]
            if adapter.exit is not None:
                vectors = exit_vectors(self.backbone, adapter.exit, own, own_lengths)
                losses[f"loss_{rung}"] = self._member_loss(vectors, *target)
                continue
            composites = multiplex(self.backbone, adapter, own, own_lengths)
            out = self.backbone.upper(
                composites.rows, composites.lengths[:, 0], composites.positions
            )
            # A composite that has the skip must answer without it too; see ``Recipe.skip``.
            both = self.training and self.ladder.config.skip and adapter.mux is not None
            parts = [
                self._member_loss(
                    demultiplex(self.backbone, adapter, out, composites, own, own_lengths, way),
                    *target,
                )
                for way in ((True, False) if both else (True,))
            ]
            losses[f"loss_{rung}"] = torch.stack(parts).mean()
            if self.paper_loss and composites.streams is not None:
                losses[f"loss_streams_{rung}"] = stream_similarity(composites.streams)
        for place, (layer, head) in enumerate(self.exits.items() if self.training else ()):
            losses[f"loss_exit_{layer}"] = answer_loss(
                head(exit_states[:, place]), labels, teacher_logits
            )
        return {"loss": torch.stack(list(losses.values())).sum()} | losses

    def _member_loss(
        self, vectors: Tensor, labels: Tensor, teacher_logits: Tensor, teacher_vectors: Tensor
    ) -> Tensor:
        vectors = vectors.flatten(0, 1)  # (G*N, D)
        logits = self.backbone.head(vectors)
        if self.paper_loss:
            own = answer_loss(logits, labels, teacher_logits, label_share=1.0)
            return own + self.nce_weight * info_nce(vectors, teacher_vectors)
        return answer_loss(logits, labels, teacher_logits) + vector_loss(vectors, teacher_vectors)

    def _groups(self, lengths: Tensor, width: int) -> Tensor:
        """Random in training; while measuring the same every time."""
        with torch.random.fork_rng(enabled=not self.training):
            if not self.training:
                torch.manual_seed(0)
            return random_groups(lengths, width)


def unfinished(work: Path) -> Path | None:
    """The last complete trainer checkpoint under ``work``: its state is what is written last."""
    found = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def begin(work: Path, options: dict[str, Any], resume: bool) -> None:
    """Check that a training can start, or go on, in ``work``, and note its ``options`` there.

    Raises:
        ValueError: an unfinished training stands in the way, or there is none to resume, or it was
            begun with other options.
    """
    path = work / OPTIONS_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if resume:
        if before is None:
            raise ValueError(f"--resume: no unfinished training in {work}; leave --resume out")
        changed = [f"{k} was {before.get(k)!r}" for k in options if options[k] != before.get(k)]
        if changed:
            raise ValueError(f"--resume: begun with other options: {'; '.join(changed)}")
        return
    if unfinished(work):
        raise ValueError(
            f"{work}: an unfinished training; continue it with --resume, or remove that folder"
        )
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        path.write_text(json.dumps(options), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output {work.parent}: cannot be written: {error}") from error


def train(
    backbone: Backbone,
    ladder: AdapterLadder,
    exits: nn.ModuleDict,
    features: Features,
    held_out: Features | None,
    work: Path,
    recipe: Recipe,
    *,
    seed: int,
    evaluations: int = 10,
    patience: int = 5,
    bf16: bool = False,
    gradient_accumulation: int = 1,
) -> None:
    """Train ``ladder`` and ``exits`` in place; the backbone stays as it is.

    Batches hold rows of similar length, as the packing serves them; the lengths that they are
    sorted by are blurred, so that unequal partners are met as well.

    Args:
        backbone: frozen.
        ladder: adapters to train.
        exits: early exits to train, one per layer of ``features.exits``.
        features: rows to train on.
        held_out: rows that choose the best of the checkpoints and stop the training when it no
            longer gets better; None: train to the end.
        work: folder of checkpoints and log; what ``unfinished`` finds there is continued.
        recipe: how.
        seed: of everything random.
        evaluations: how often ``held_out`` is asked and a checkpoint is kept.
        patience: evaluations without progress until it stops.
        bf16: automatic mixed precision.
        gradient_accumulation: batches per step.
    """

    def rows_of(own: Features) -> Dataset:
        noise = torch.empty(len(own)).uniform_(0.7, 1.4)
        return Dataset.from_dict(
            {
                "row": list(range(len(own))),
                "length": (own.lengths * noise).long().tolist(),
                "held_out": [own is held_out] * len(own),
            }
        )

    def collate(batch: list[dict[str, int]]) -> dict[str, Tensor]:
        own = held_out if batch[0]["held_out"] else features
        assert own is not None
        index = torch.tensor([example["row"] for example in batch])
        return {
            "hidden": own.padded(index),
            "lengths": own.lengths[index],
            "labels": own.labels[index],
            "teacher_vectors": own.vectors[index],
            "teacher_logits": own.logits[index],
            "exit_states": own.exits[index].float(),
        }

    processes = process_state().num_processes
    step = recipe.batch_size * gradient_accumulation * processes
    steps_per_epoch = max(1, len(features) // step)
    every = max(1, round(recipe.epochs * steps_per_epoch / evaluations))
    arguments: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if held_out is not None:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    settings = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=0.06,
        weight_decay=0.01,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=min(recipe.batch_size, len(held_out or features) // processes),
        gradient_accumulation_steps=gradient_accumulation,
        bf16=bf16,
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
        seed=seed,
        **arguments,
    )
    # Several GPUs are for accelerate launch: without it Trainer would copy the adapters to all of
    # them and leave the backbone on the first.
    settings._n_gpu = min(1, settings.n_gpu)
    trainer = Trainer(
        model=LadderModel(backbone, ladder, exits, recipe.paper_loss),
        args=settings,
        train_dataset=rows_of(features),
        eval_dataset=None if held_out is None else rows_of(held_out),
        data_collator=collate,
        callbacks=[JsonLines(work / LOG_FILE), SameOrder(), Progress()]
        + ([EarlyStoppingCallback(patience)] if held_out is not None else []),
    )
    trainer.remove_callback(PrinterCallback)
    last = unfinished(work)
    if last is not None:
        _forget_lines(work / LOG_FILE, int(last.name.split("-")[1]))
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors meet a full disk
        if shutil.disk_usage(work).free > FULL_DISK:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work)) from error
    ladder.eval()
    exits.eval()


def _forget_lines(log: Path, step: int) -> None:
    """Drop what was reported behind ``step``: it is run again. Nothing may have been yet."""
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    log.write_text("".join(kept), encoding="utf-8")
