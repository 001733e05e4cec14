"""T5: the encoder is cut; the rest of it and one decoder step run on a composite (the paper's way).

The answer is the decoder's first state, scored by the label words' rows of the LM head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from revmux_vllm.backbones.base import Backbone, inside, shared_copy


class T5Backbone(Backbone):
    """Read at the decoder's only position."""

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        super().__init__(model, prefill_layers, head)
        self.layers = list(model.encoder.block)
        self.encoder, self.norm = model.encoder, model.encoder.final_layer_norm
        self.decoder = model.decoder
        self.start_token = int(model.config.decoder_start_token_id)

    def lower(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        token_type_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        mask = inside(lengths, input_ids.shape[1])
        encoder = self._layers(0, self.prefill_layers)
        return encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def _between(
        self,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor | None,
        first: int,
        last: int,
        cache: Any = None,
    ) -> Tensor:
        mask = inside(lengths, rows.shape[1])
        encoder = self._layers(first, last)
        return encoder(inputs_embeds=rows, attention_mask=mask).last_hidden_state

    def _finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        start = torch.full((len(states), 1), self.start_token, device=states.device)
        return self.decoder(
            input_ids=start,
            encoder_hidden_states=self.norm(states),
            encoder_attention_mask=inside(lengths, states.shape[1]),
            use_cache=False,
        ).last_hidden_state  # (G, 1, D)

    def _layers(self, first: int, last: int) -> Any:
        """Some blocks of the encoder, without its final norm."""
        encoder = shared_copy(self.encoder)
        begin = _with_position_bias(self.layers[first], self.layers[0])
        encoder.block = nn.ModuleList([begin, *self.layers[first + 1 : last]])
        encoder.final_layer_norm = nn.Identity()
        return encoder

    def output_position(self, lengths: Tensor) -> Tensor:
        return lengths * 0


def _with_position_bias(block: Any, first: Any) -> Any:
    """``block`` computing the relative-position bias; only the first one has weights for it."""
    block = shared_copy(block)
    block.layer = nn.ModuleList(block.layer)
    block.layer[0] = shared_copy(block.layer[0])
    attention = shared_copy(block.layer[0].SelfAttention)
    attention.has_relative_attention_bias = True
    attention.relative_attention_bias = first.layer[0].SelfAttention.relative_attention_bias
    block.layer[0].SelfAttention = attention
    return block
