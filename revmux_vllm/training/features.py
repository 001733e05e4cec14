"""What the frozen backbone says of every row, computed once and kept in memory.

The prefill states feed the adapters and the final vectors teach them; neither changes while
adapters train, so nothing below the cut and no teacher runs in the training loop.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from revmux_vllm.backbones import LlamaBackbone
from revmux_vllm.reference import pooled_rows
from revmux_vllm.training.data import LabelledText

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Features:
    """Prefill states and the backbone's own answers.

    Attributes:
        hidden: (total tokens, D), the sequences one after the other.
        starts: (B + 1,) first row of every sequence in ``hidden``.
        vectors: (B, D) the pooled vector that the backbone's head reads.
        logits: (B, C) the backbone's answer.
        labels: (B,) int64.
    """

    hidden: Tensor
    starts: Tensor
    vectors: Tensor
    logits: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of every sequence."""
        return self.starts.diff()

    def padded(self, index: Tensor) -> Tensor:
        """Prefill states (len(index), T, D) of some sequences, zero behind each."""
        lengths = self.lengths[index]
        position = torch.arange(int(lengths.max()))
        inside = position < lengths[:, None]  # (b, T)
        rows = (self.starts[index, None] + position) * inside
        return self.hidden[rows] * inside.unsqueeze(-1)


@torch.no_grad()
def extract(
    backbone: LlamaBackbone, tokenizer: Any, data: LabelledText, max_tokens: int
) -> Features:
    """Run the backbone over ``data``, longest rows first, with a progress bar."""
    if isinstance(data.texts[0], tuple):
        first, second = zip(*data.texts, strict=True)
        encoded = tokenizer(list(first), list(second), truncation=True, max_length=max_tokens)
    else:
        encoded = tokenizer(list(data.texts), truncation=True, max_length=max_tokens)
    ids: list[list[int]] = encoded["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    size = backbone.config.hidden_size
    hidden = torch.empty(int(starts[-1]), size)
    vectors = torch.empty(len(ids), size)
    order = np.argsort(-lengths.numpy(), kind="stable")
    batches, begin = [], 0
    while begin < len(order):
        step = max(1, TOKENS_PER_BATCH // int(lengths[order[begin]]))
        batches.append(order[begin : begin + step])
        begin += step
    for batch in track(batches, f"backbone over {len(ids):,} rows"):
        padded = torch.zeros(len(batch), int(lengths[batch[0]]), dtype=torch.long)
        for row, index in enumerate(batch):
            padded[row, : len(ids[index])] = torch.tensor(ids[index])
        low = backbone.lower(padded)
        index = torch.from_numpy(batch)
        vectors[index] = pooled_rows(backbone.upper(low), lengths[index])
        for row, own in enumerate(batch):
            hidden[starts[own] : starts[own + 1]] = low[row, : lengths[own]]
    return Features(hidden, starts, vectors, backbone.head(vectors), torch.tensor(data.labels))
