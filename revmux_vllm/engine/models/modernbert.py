"""ModernBERT: attention both ways and no cache, over all rows or over a window of them, by layer.

vLLM's layers know their own window and their own rotary embedding, and its kernels count a window
in rows. The metadata say where sequences begin, which is the same for layers of both kinds.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.modernbert import (
    ModernBertEmbeddings,
    ModernBertLayer,
    ModernBertPredictionHead,
)
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm.engine.layout import pooled_and_mean
from revmux_vllm.engine.models.base import Layout, RevMuxForSequenceClassification
from revmux_vllm.engine.models.parts import classify_pooler


@support_torch_compile
class LowerTrunk(nn.Module):
    """Embeddings and prefill layers: one row per token of the batch."""

    def __init__(self, *, vllm_config: VllmConfig, num_layers: int) -> None:
        super().__init__()
        self.embeddings = ModernBertEmbeddings(vllm_config.model_config.hf_config)
        self.layers = _layers(vllm_config, range(num_layers))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embeddings.embed_input_ids(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids)
        for layer in self.layers.values():
            hidden = layer(hidden, positions)
        return hidden


@support_torch_compile
class UpperTrunk(nn.Module):
    """Some of the remaining layers, the final norm behind the last: one row per upper row."""

    def __init__(self, *, vllm_config: VllmConfig, indices: range) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.layers = _layers(vllm_config, indices)
        self.norm = None
        if indices.stop == config.num_hidden_layers:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers.values():
            hidden = layer(hidden, positions)
        return hidden if self.norm is None else self.norm(hidden)


def _layers(vllm_config: VllmConfig, indices: range) -> nn.ModuleDict:
    """Encoder layers under the names that the backbone's checkpoint gives them."""
    return nn.ModuleDict(
        {
            str(i): ModernBertLayer(
                config=vllm_config.model_config.hf_config,
                layer_id=i,
                dtype=vllm_config.model_config.dtype,
                quant_config=vllm_config.quant_config,
                prefix=f"model.layers.{i}",
            )
            for i in indices
        }
    )


class RevMuxModernBertForSequenceClassification(RevMuxForSequenceClassification):
    """Read at the first row, or from the mean over all rows, as ``classifier_pooling`` says."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"Wqkv": ["Wqkv"], "Wi": ["Wi"]}
    default_seq_pooling_type: ClassVar[str] = "CLS"  # where a mean is written, too
    weights_mapper = WeightsMapper()

    def build(self, vllm_config: VllmConfig) -> list[list[Any]]:
        model_config = vllm_config.model_config
        self.reads_mean = model_config.hf_config.classifier_pooling == "mean"
        self.reads_sequences = self.reads_mean
        with set_model_tag("revmux_lower"):
            self.lower = LowerTrunk(vllm_config=vllm_config, num_layers=self.bounds[0])
        self.upper = self.segments(
            lambda indices: UpperTrunk(vllm_config=vllm_config, indices=indices)
        )
        self.head = ModernBertPredictionHead(model_config.hf_config).to(model_config.head_dtype)
        self.classifier = nn.Linear(
            model_config.hf_config.hidden_size,
            model_config.hf_config.num_labels,
            dtype=model_config.head_dtype,
        )
        self.pooler = classify_pooler(vllm_config, self.answer)
        return [
            [layer.get_submodule("attn.attn") for layer in part.layers.values()]
            for part in self.upper
        ]

    def answer(self, vectors: Tensor) -> Tensor:
        return self.classifier(self.head(vectors.to(self.classifier.weight.dtype)))

    def run_segment(
        self, part: int, rows: Tensor, positions: Tensor, layout: Layout | None
    ) -> Tensor:
        states = super().run_segment(part, rows, positions, layout)
        if not self.reads_mean or layout is None or self.bounds[part + 1] < self.num_layers:
            return states
        starts, num_rows = layout.sequence_starts, layout.num_tokens
        if layout.rungs:
            num_groups, num_rows = layout.passing(self.bounds[part])
            starts = layout.starts[:num_groups].long()
        means = pooled_and_mean(states[:num_rows], starts, starts, states.dtype)[:, 1]
        return states.index_copy(0, starts, means)

    def weight_names(self) -> WeightsMapper:
        return WeightsMapper(
            orig_to_new_prefix={
                **self.layer_prefixes("model.layers"),
                "model.embeddings.": "lower.embeddings.",
                "model.final_norm.": f"upper.{len(self.upper) - 1}.norm.",
            }
        )
