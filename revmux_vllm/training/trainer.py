"""Train a ladder of adapters, and beside it the early exit that it has to beat."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.backbones import LlamaBackbone
from revmux_vllm.reference import demultiplex, multiplex, skip_state
from revmux_vllm.training.features import Features
from revmux_vllm.training.losses import answer_loss, random_groups, vector_loss


class EarlyExit(nn.Module):
    """The rival: three linear layers on what the prefill layers know (docs/measurements.md)."""

    def __init__(self, hidden_size: int, inner_size: int, num_labels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.RMSNorm(hidden_size, eps=1e-6),
            nn.Flatten(-2),
            nn.Linear(2 * hidden_size, inner_size),
            nn.ReLU(),
            nn.Linear(inner_size, inner_size),
            nn.ReLU(),
            nn.Linear(inner_size, num_labels),
        )

    def forward(self, skip: Tensor) -> Tensor:
        """Prefill states (B, 2, D) to logits (B, C)."""
        return self.layers(skip)


class LadderModel(nn.Module):
    """What ``Trainer`` trains: the loss of every width, and of the early exit, on one batch."""

    def __init__(self, backbone: LlamaBackbone, ladder: AdapterLadder, early: EarlyExit) -> None:
        super().__init__()
        self.backbone, self.ladder, self.early = backbone, ladder, early

    def forward(
        self,
        hidden: Tensor,
        lengths: Tensor,
        labels: Tensor,
        teacher_vectors: Tensor,
        teacher_logits: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of a padded batch; shapes as in ``Features``, ``hidden`` (B, T, D)."""
        adapters = self.ladder.items()
        groups = [random_groups(lengths, width) for width, _ in adapters]
        composites = [
            multiplex(adapter, hidden[group], lengths[group])
            for (_, adapter), group in zip(adapters, groups, strict=True)
        ]
        outs = self.backbone.upper(torch.cat(composites)).split([len(c) for c in composites])
        loss = answer_loss(self.early(skip_state(hidden, lengths)), labels, teacher_logits)
        for (_, adapter), group, out in zip(adapters, groups, outs, strict=True):
            vectors = demultiplex(adapter, out, hidden[group], lengths[group]).flatten(0, 1)
            rows = group.flatten()
            loss = loss + answer_loss(
                self.backbone.head(vectors), labels[rows], teacher_logits[rows]
            )
            loss = loss + vector_loss(vectors, teacher_vectors[rows])
        return {"loss": loss}


def train(
    backbone: LlamaBackbone,
    ladder: AdapterLadder,
    early: EarlyExit,
    features: Features,
    output: Path,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    skip_dropout: float,
    seed: int,
) -> None:
    """Train ``ladder`` and ``early`` in place; the backbone stays as it is.

    Batches hold rows of similar length, as the packing serves them; the lengths that they are
    sorted by are blurred, so that unequal partners are met as well.
    """
    for _, adapter in ladder.items():
        adapter.skip_dropout = skip_dropout
    noise = torch.empty(len(features)).uniform_(0.7, 1.4)
    rows = Dataset.from_dict(
        {
            "row": list(range(len(features))),
            "length": (features.lengths * noise).long().tolist(),
        }
    )

    def collate(batch: list[dict[str, int]]) -> dict[str, Tensor]:
        index = torch.tensor([example["row"] for example in batch])
        return {
            "hidden": features.padded(index),
            "lengths": features.lengths[index],
            "labels": features.labels[index],
            "teacher_vectors": features.vectors[index],
            "teacher_logits": features.logits[index],
        }

    arguments: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    Trainer(
        model=LadderModel(backbone, ladder, early),
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.06,
            weight_decay=0.01,
            per_device_train_batch_size=batch_size,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            seed=seed,
            **arguments,
        ),
        train_dataset=rows,
        data_collator=collate,
    ).train()
    ladder.eval()
    early.eval()


@torch.no_grad()
def measure_exit(early: EarlyExit, features: Features, prefill_layers: int) -> dict[str, Any]:
    """Accuracy and agreement of the early exit, as in the report of ``revmux eval``."""
    answers = []
    for index in torch.arange(len(features)).split(256):
        state = skip_state(features.padded(index), features.lengths[index])
        answers.append(early(state).argmax(-1))
    answer = torch.cat(answers)
    own = features.logits.argmax(-1)
    return {
        "prefill_layers": prefill_layers,
        "accuracy": (answer == features.labels).float().mean().item(),
        "agreement": (answer == own).float().mean().item(),
    }
