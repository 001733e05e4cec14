"""LLaMA and the relatives that share its module shape: Mistral, Qwen2, Qwen3.

Right padding and causal attention: what stands behind a sequence cannot reach it, so no padding
mask is needed anywhere, neither for sequences nor for composites of unequal members.
"""

import copy
from typing import Any

from torch import Tensor, nn

from revmux_vllm.backbones.base import Backbone, inside, shared_copy


class DecoderBackbone(Backbone):
    """Read at the last token, by the classifier's ``score`` or by label words."""

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        super().__init__(model, prefill_layers, head or model.score)
        self.layers = list(model.model.layers)
        self.trunk, self.norm = model.model, model.model.norm

    def lower(
        self, input_ids: Tensor, lengths: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        trunk = _cut(self.trunk, 0, self.prefill_layers)
        return trunk(input_ids=input_ids, use_cache=False).last_hidden_state

    def _between(
        self, rows: Tensor, lengths: Tensor, positions: Tensor | None, first: int, last: int
    ) -> Tensor:
        # Without a mask transformers takes positions that skip for several packed sequences.
        mask = None if positions is None else inside(lengths, rows.shape[1]).long()
        return _cut(self.trunk, first, last)(
            inputs_embeds=rows, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def _finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        return self.norm(states)


def _cut(trunk: Any, start: int, stop: int) -> Any:
    """Some layers of a trunk, without the final norm."""
    part = shared_copy(trunk)
    part.norm = nn.Identity()
    part.layers = nn.ModuleList(trunk.layers[start:stop])
    part.config = copy.copy(trunk.config)
    part.config.num_hidden_layers = stop - start
    if getattr(trunk.config, "layer_types", None):  # Qwen: full or sliding attention, by layer
        part.config.layer_types = trunk.config.layer_types[start:stop]
    return part
