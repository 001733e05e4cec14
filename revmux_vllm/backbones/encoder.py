"""BERT and the RoBERTas: attention both ways, read at the first token."""

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from revmux_vllm.backbones.base import Backbone, inside, shared_copy


class EncoderBackbone(Backbone):
    """Read at ``[CLS]``, through the backbone's own pooler where it has one."""

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        trunk = model.base_model
        super().__init__(model, prefill_layers, head or FirstTokenHead(trunk.pooler, model))
        self.layers = list(trunk.encoder.layer)
        self.embeddings = trunk.embeddings
        self.encoder = trunk.encoder

    def lower(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        token_type_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        rows = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
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
        encoder = shared_copy(self.encoder)
        encoder.layer = nn.ModuleList(self.layers[first:last])
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=rows,
            attention_mask=inside(lengths, rows.shape[1]),
        )
        return encoder(rows, attention_mask=mask).last_hidden_state


class FirstTokenHead(nn.Module):
    """Pooler and classifier, which index the first token by themselves."""

    def __init__(self, pooler: nn.Module | None, model: Any) -> None:
        super().__init__()
        self.pooler, self.classifier = pooler, model.classifier

    def forward(self, pooled: Tensor) -> Tensor:
        """(M, D) to (M, C)."""
        rows = pooled.unsqueeze(1)  # (M, 1, D)
        return self.classifier(rows if self.pooler is None else self.pooler(rows))
