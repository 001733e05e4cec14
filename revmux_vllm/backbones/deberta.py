"""DeBERTa v2 and v3: attention both ways, biased by relative position, read at the first token.

A relative position counts the rows that a layer runs on. Above the cut a merged row is one of them,
and so is a composite's, whatever each stands for.
"""

from typing import Any

from torch import Tensor, nn

from revmux_vllm.backbones.base import inside, shared_copy
from revmux_vllm.backbones.encoder import EncoderBackbone, FirstTokenHead


class DebertaV2Backbone(EncoderBackbone):
    """Read through the backbone's own pooler."""

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        super().__init__(model, prefill_layers, head or FirstTokenHead(model.pooler, model))
        if self.encoder.conv is not None:
            self.layers[0] = _Convolved(self.layers[0], self.encoder.conv)

    def embed(self, input_ids: Tensor, lengths: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Zero behind each sequence, where a convolution would look."""
        mask = inside(lengths, input_ids.shape[1])
        rows: Tensor = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, mask=mask
        )
        return rows

    def _between(
        self,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor | None,
        first: int,
        last: int,
        cache: Any = None,
    ) -> Tensor:
        encoder = shared_copy(self.encoder)
        encoder.layer = nn.ModuleList(self.layers[first:last])
        encoder.conv = None  # of the whole model's first layer alone
        mask = inside(lengths, rows.shape[1]).long()  # which transformers subtracts from 1
        return encoder(rows, attention_mask=mask, output_hidden_states=False).last_hidden_state


class _Convolved(nn.Module):
    """The first layer, and the convolution of what it reads, which v2's larger models add."""

    def __init__(self, layer: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.layer, self.conv = layer, conv

    def forward(self, rows: Tensor, mask: Tensor, **more: Any) -> tuple[Tensor, Any]:
        """As a layer of transformers: rows (B, T, D) and ``mask`` (B, 1, T, T)."""
        states, weights = self.layer(rows, mask, **more)
        own = mask[:, 0].diagonal(dim1=1, dim2=2)  # (B, T)
        return self.conv(rows, states, own), weights
