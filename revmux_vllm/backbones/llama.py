"""A transformers LLaMA classifier, cut after its prefill layers.

Right padding and causal attention: what stands behind a sequence cannot reach it, so no padding
mask is needed anywhere, neither for sequences nor for composites of unequal members.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification


class LlamaBackbone(nn.Module):
    """Lower layers, upper layers and head of a ``LlamaForSequenceClassification``.

    The parts share the model's own modules; nothing is copied and nothing can train.

    Args:
        model: the classifier. Set to eval mode and frozen here.
        prefill_layers: layers (l) that belong to the lower part.
    """

    def __init__(self, model: LlamaForSequenceClassification, prefill_layers: int) -> None:
        super().__init__()
        model.requires_grad_(False).eval()
        self.config = model.config
        self.prefill_layers = prefill_layers
        num_layers = model.config.num_hidden_layers
        self.lower_trunk = _cut(model.model, 0, prefill_layers)
        self.upper_trunk = _cut(model.model, prefill_layers, num_layers)
        self.lower_trunk.norm = nn.Identity()
        self.score = model.score

    @classmethod
    def from_folder(cls, folder: str | Path, prefill_layers: int) -> "LlamaBackbone":
        """Load the weights in float32."""
        model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return cls(model, prefill_layers)

    @property
    def num_labels(self) -> int:
        """Classes of the head."""
        return int(self.score.out_features)

    def train(self, mode: bool = True) -> "LlamaBackbone":
        """Stays in eval mode: a frozen backbone has no dropout."""
        return super().train(False)

    def lower(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) to hidden states (B, T, D) after the prefill layers."""
        return self.lower_trunk(input_ids=input_ids, use_cache=False).last_hidden_state

    def upper(self, rows: Tensor) -> Tensor:
        """Rows (G, T, D), of sequences or composites, to final normed states (G, T, D)."""
        return self.upper_trunk(inputs_embeds=rows, use_cache=False).last_hidden_state

    def head(self, pooled: Tensor) -> Tensor:
        """Pooled vectors (M, D) to logits (M, C)."""
        return self.score(pooled)


def _cut(trunk: Any, start: int, stop: int) -> Any:
    """``trunk`` with some of its layers only; every module is shared with the original."""
    part = copy.copy(trunk)
    part._modules = dict(trunk._modules)
    part.layers = nn.ModuleList(trunk.layers[start:stop])
    part.config = copy.copy(trunk.config)
    part.config.num_hidden_layers = stop - start
    return part
