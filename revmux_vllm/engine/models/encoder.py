"""BERT and its kin: attention both ways and no cache, read at the first token."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.bert import (
    BertEmbedding,
    BertLayer,
    BertPooler,
    BertPoolingModel,
)
from vllm.model_executor.models.roberta import RobertaClassificationHead, RobertaEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm.engine.models.base import Layout, RevMuxForSequenceClassification
from revmux_vllm.engine.models.pairs import separator_of_pairs, write_token_types
from revmux_vllm.engine.models.parts import classify_pooler


@support_torch_compile
class LowerTrunk(nn.Module):
    """Embeddings and prefill layers: one row per token of the batch."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        config: Any,
        embedding_class: type[nn.Module],
        num_layers: int,
    ) -> None:
        super().__init__()
        self.embeddings: Any = embedding_class(config)
        self.layers = _layers(vllm_config, config, range(num_layers))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embeddings.word_embeddings(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids=input_ids, position_ids=positions)
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden


@support_torch_compile
class UpperTrunk(nn.Module):
    """Some of the remaining layers: one row per upper row. Positions are in the rows already."""

    def __init__(self, *, vllm_config: VllmConfig, config: Any, indices: range) -> None:
        super().__init__()
        self.layers = _layers(vllm_config, config, indices)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden


def _layers(vllm_config: VllmConfig, config: Any, indices: range) -> nn.ModuleDict:
    """Encoder layers under the names that the backbone's checkpoint gives them."""
    return nn.ModuleDict(
        {
            str(i): BertLayer(
                config=config,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                prefix=f"bert.encoder.layer.{i}",
            )
            for i in indices
        }
    )


class RevMuxBertForSequenceClassification(RevMuxForSequenceClassification):
    """Read through the backbone's own pooler."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["query", "key", "value"]}
    default_seq_pooling_type: ClassVar[str] = "CLS"
    trunk_name: ClassVar[str] = "bert"
    embedding_class: ClassVar[type[nn.Module]] = BertEmbedding
    weights_mapper = BertPoolingModel.hf_to_vllm_mapper

    def build(self, vllm_config: VllmConfig) -> list[list[Any]]:
        model_config = vllm_config.model_config
        config = self.bert_config(model_config.hf_config)
        self.separator = separator_of_pairs(model_config, self.revmux)
        self.reads_sequences = self.separator is not None
        with set_model_tag("revmux_lower"):
            self.lower = LowerTrunk(
                vllm_config=vllm_config,
                config=config,
                embedding_class=self.embedding_class,
                num_layers=self.bounds[0],
            )
        self.upper = self.segments(
            lambda indices: UpperTrunk(vllm_config=vllm_config, config=config, indices=indices)
        )
        self.build_head(vllm_config)
        return [
            [layer.get_submodule("attention.self.attn") for layer in part.layers.values()]
            for part in self.upper
        ]

    def bert_config(self, hf_config: Any) -> Any:
        """What vLLM's embeddings and layers read of the backbone's config."""
        return hf_config

    def build_head(self, vllm_config: VllmConfig) -> None:
        """Set the head's modules, under the names of the backbone's checkpoint, and ``pooler``."""
        model_config = vllm_config.model_config
        self.first_token = BertPooler(model_config)
        self.classifier: nn.Module = nn.Linear(
            model_config.hf_config.hidden_size,
            model_config.hf_config.num_labels,
            dtype=model_config.head_dtype,
        )
        self.pooler = classify_pooler(vllm_config, self.classifier, self.first_token)

    def answer(self, vectors: Tensor) -> Tensor:
        states = vectors.to(self.first_token.dense.weight.dtype)
        return self.classifier(self.first_token.act_fn(self.first_token.dense(states)))

    def set_token_type_ids(
        self, input_ids: Tensor, token_type_ids: Tensor | None, layout: Layout | None
    ) -> None:
        write_token_types(input_ids, token_type_ids, self.separator, layout)

    def weight_names(self) -> WeightsMapper:
        name = self.trunk_name
        return WeightsMapper(
            orig_to_new_prefix={
                **self.layer_prefixes(f"{name}.encoder.layer"),
                f"{name}.embeddings.": "lower.embeddings.",
                f"{name}.pooler.": "first_token.",
            }
        )


class ClassificationHead(RobertaClassificationHead):
    """RoBERTa's two layers, with any activation between them."""

    def __init__(self, model_config: ModelConfig, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model_config)
        self.activation = activation

    def forward(self, pooled: Tensor) -> Tensor:
        """(M, D) to (M, C)."""
        logits: Tensor = self.out_proj(self.activation(self.dense(pooled)))
        return logits


class RevMuxRobertaForSequenceClassification(RevMuxBertForSequenceClassification):
    """Read by the backbone's own two-layer head; positions count from behind the padding token."""

    trunk_name = "roberta"
    embedding_class = RobertaEmbedding
    activation: ClassVar[Callable[..., Tensor]] = staticmethod(torch.tanh)

    def build_head(self, vllm_config: VllmConfig) -> None:
        """Set the head's modules, under the names of the backbone's checkpoint, and ``pooler``."""
        self.classifier = ClassificationHead(vllm_config.model_config, self.activation)
        self.pooler = classify_pooler(vllm_config, self.classifier)

    def answer(self, vectors: Tensor) -> Tensor:
        head: Any = self.classifier
        return head(vectors.to(head.dense.weight.dtype))


class RevMuxXLMRobertaForSequenceClassification(RevMuxRobertaForSequenceClassification):
    """The same module for module."""
