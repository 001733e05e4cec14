"""LLaMA and the relatives that share its module shape: Mistral, Qwen2, Qwen3.

Right padding and causal attention: what stands behind a sequence cannot reach it, so no padding
mask is needed anywhere, neither for sequences nor for composites of unequal members.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from revmux_vllm.backbones.base import Backbone, inside, shared_copy


class DecoderBackbone(Backbone):
    """Read at the last token, by the classifier's ``score`` or by label words."""

    is_causal = True

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        super().__init__(model, prefill_layers, head or model.score)
        self.layers = list(model.model.layers)
        self.trunk, self.norm = model.model, model.model.norm

    def lower(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        token_type_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        trunk = _cut(self.trunk, 0, self.prefill_layers)
        more = {"past_key_values": cache, "use_cache": cache is not None}
        return trunk(input_ids=input_ids, **more).last_hidden_state

    def prefix_cache(self, first: int) -> Any:
        return PrefixCache(first)

    def _between(
        self,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor | None,
        first: int,
        last: int,
        cache: Any,
    ) -> Tensor:
        before = 0 if cache is None else cache.get_seq_length()
        # Without a mask transformers takes positions that skip for several packed sequences.
        mask = None if positions is None else inside(lengths, before + rows.shape[1]).long()
        return _cut(self.trunk, first, last)(
            inputs_embeds=rows,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        return self.norm(states)


class PrefixCache(DynamicCache):
    """Keys and values of what all sequences begin with: the first pass fills it, others read it.

    Args:
        first: layer of the model that comes first here.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, T, d) of a layer, those of the prefix before them."""
        here = layer_idx - self.first
        if here >= len(self.layers):
            return super().update(key_states, value_states, here, *args, **kwargs)
        kept: Any = self.layers[here]
        count = len(key_states)
        return (
            torch.cat([kept.keys.expand(count, -1, -1, -1), key_states], dim=-2),
            torch.cat([kept.values.expand(count, -1, -1, -1), value_states], dim=-2),
        )


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
