"""BERT and its kin: attention both ways, read at the first token."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from revmux_vllm.backbones.base import Backbone, inside, shared_copy


class EncoderBackbone(Backbone):
    """Read at ``[CLS]``, through the backbone's own pooler where it has one.

    ELECTRA's embeddings may have fewer channels than its layers, and are projected to theirs.
    """

    encoder_name: ClassVar[str] = "encoder"

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        trunk = model.base_model
        own_head = head or FirstTokenHead(getattr(trunk, "pooler", None), model)
        super().__init__(model, prefill_layers, own_head)
        self.encoder = getattr(trunk, self.encoder_name)
        self.layers = list(self.encoder.layer)
        self.embeddings = trunk.embeddings
        self.project = getattr(trunk, "embeddings_project", nn.Identity())

    def embed(self, input_ids: Tensor, lengths: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Token ids (B, T) of ``lengths`` (B,) to the first layer's rows (B, T, D)."""
        rows = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        projected: Tensor = self.project(rows)
        return projected

    def lower(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        token_type_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        rows = self.embed(input_ids, lengths, token_type_ids)
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


class DistilBertBackbone(EncoderBackbone):
    """BERT's layers under another name, without token types and with a two-layer head."""

    encoder_name = "transformer"

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None = None) -> None:
        own_head = nn.Sequential(model.pre_classifier, nn.ReLU(), model.classifier)
        super().__init__(model, prefill_layers, head or own_head)

    def embed(self, input_ids: Tensor, lengths: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """As in transformers, token types that a tokenizer brings are passed over."""
        rows: Tensor = self.embeddings(input_ids=input_ids)
        return rows


class FirstTokenHead(nn.Module):
    """Pooler and classifier, which index the first token by themselves."""

    def __init__(self, pooler: nn.Module | None, model: Any) -> None:
        super().__init__()
        self.pooler, self.classifier = pooler, model.classifier

    def forward(self, pooled: Tensor) -> Tensor:
        """(M, D) to (M, C)."""
        rows = pooled.unsqueeze(1)  # (M, 1, D)
        return self.classifier(rows if self.pooler is None else self.pooler(rows))
