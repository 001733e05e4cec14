"""DeBERTa v2 and v3: transformers' own layers, read at the first token."""

from typing import ClassVar

from torch import Tensor
from transformers import DebertaV2ForSequenceClassification
from vllm.config import VllmConfig
from vllm.model_executor.models.bert import _decode_token_type_ids

from revmux_vllm.backbones.base import Backbone
from revmux_vllm.backbones.deberta import DebertaV2Backbone
from revmux_vllm.engine.models.base import Layout
from revmux_vllm.engine.models.padded import RevMuxPaddedForSequenceClassification
from revmux_vllm.engine.models.pairs import separator_of_pairs, write_token_types
from revmux_vllm.engine.models.parts import classify_pooler


class RevMuxDebertaV2ForSequenceClassification(RevMuxPaddedForSequenceClassification):
    """Read through the backbone's own pooler."""

    default_seq_pooling_type: ClassVar[str] = "CLS"

    def build_backbone(self, vllm_config: VllmConfig) -> Backbone:
        model_config = vllm_config.model_config
        self.separator = separator_of_pairs(model_config, self.revmux)
        self.model = DebertaV2ForSequenceClassification(model_config.hf_config)
        for part in (self.model.pooler, self.model.classifier):
            part.to(model_config.head_dtype)
        self.pooler = classify_pooler(vllm_config, self.answer)
        return DebertaV2Backbone(self.model, self.bounds[0])

    def answer(self, vectors: Tensor) -> Tensor:
        return self.cut.classifier(vectors.to(self.model.classifier.weight.dtype))

    def set_token_type_ids(
        self, input_ids: Tensor, token_type_ids: Tensor | None, layout: Layout | None
    ) -> None:
        write_token_types(input_ids, token_type_ids, self.separator, layout)

    def lower_batch(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        # Where ``type_vocab_size`` is 0, as in v3, the embeddings pass over them.
        types = _decode_token_type_ids(input_ids)
        return self.cut.lower(input_ids, lengths, types)
