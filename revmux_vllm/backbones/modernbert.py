"""ModernBERT: layers that see all of a sequence, and layers that see a window of it both ways.

A window is counted in the rows that a layer runs on, whatever each of them stands for; rotary
positions are those of the tokens. So a window over merged rows reaches as many times as far.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
)

from revmux_vllm.backbones.base import Backbone, inside
from revmux_vllm.backbones.loading import FULL, SLIDING

MASKS = {
    FULL: create_bidirectional_mask,
    SLIDING: create_bidirectional_sliding_window_mask,
}


class ModernBertBackbone(Backbone):
    """Read at the first row, or from the mean over all rows, as ``classifier_pooling`` says."""

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        super().__init__(model, prefill_layers, nn.Sequential(model.head, model.classifier))
        trunk = model.model
        self.layers = list(trunk.layers)
        self.embeddings, self.norm = trunk.embeddings, trunk.final_norm
        self.rotary = trunk.rotary_emb

    def lower(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        token_type_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        rows = self.embeddings(input_ids=input_ids)
        return self.between(rows, lengths, None, 0, self.prefill_layers)

    def _between(
        self,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor | None,
        first: int,
        last: int,
        cache: Any = None,
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(rows.shape[1], device=rows.device)[None]
        layers: list[Any] = self.layers[first:last]
        kinds = {layer.attention_type for layer in layers}
        own = inside(lengths, rows.shape[1])
        masks = {
            kind: MASKS[kind](config=self.config, inputs_embeds=rows, attention_mask=own)
            for kind in kinds
        }
        turns = {kind: self.rotary(rows, positions, kind) for kind in kinds}
        for layer in layers:
            kind = layer.attention_type
            rows = layer(rows, attention_mask=masks[kind], position_embeddings=turns[kind])
        return rows

    def _finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        states = self.norm(states)
        if self.config.classifier_pooling == "cls":
            return states
        own = inside(lengths, states.shape[1]).unsqueeze(-1)  # (G, T, 1)
        return (states.float() * own).sum(1, keepdim=True) / lengths[:, None, None]
