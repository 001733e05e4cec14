"""LLaMA and the relatives that share its module shape in vLLM: one class, a row for each."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.gemma import GemmaDecoderLayer
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm.backbones.loading import attention_windows
from revmux_vllm.engine.models.base import RevMuxForSequenceClassification


@dataclass(frozen=True)
class Parts:
    """What relatives do not share.

    Attributes:
        layer: vLLM's decoder layer.
        norm: behind the last one.
        scales_embeddings: by the square root of their size, in the model's dtype.
    """

    layer: type[nn.Module]
    norm: type[nn.Module] = RMSNorm
    scales_embeddings: bool = False


@support_torch_compile
class LowerTrunk(nn.Module):
    """Embedding and prefill layers: one row per token of the batch."""

    def __init__(self, *, vllm_config: VllmConfig, parts: Parts, num_layers: int) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        self.layers = _layers(vllm_config, parts.layer, range(num_layers))
        self.scale: Tensor | None
        scale = torch.tensor(config.hidden_size**0.5) if parts.scales_embeddings else None
        self.register_buffer("scale", scale, persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded if self.scale is None else embedded * self.scale

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Any = self.embed_input_ids(input_ids)
        residual: Any = None
        for layer in self.layers.values():
            hidden, residual = layer(positions, hidden, residual)
        return hidden + residual


@support_torch_compile
class UpperTrunk(nn.Module):
    """Some of the remaining layers, the final norm behind the last: one row per upper row."""

    def __init__(self, *, vllm_config: VllmConfig, parts: Parts, indices: range) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.layers = _layers(vllm_config, parts.layer, indices)
        self.norm = None
        if indices.stop == config.num_hidden_layers:
            self.norm = parts.norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        residual: Any = None
        for layer in self.layers.values():
            hidden, residual = layer(positions, hidden, residual)
        return hidden + residual if self.norm is None else self.norm(hidden, residual)[0]


def _layers(vllm_config: VllmConfig, layer_class: type[nn.Module], indices: range) -> nn.ModuleDict:
    """Decoder layers under the names that the backbone's checkpoint gives them."""
    windows = attention_windows(vllm_config.model_config.hf_config)
    layers = nn.ModuleDict()
    for i in indices:
        own = _within(vllm_config, windows[i])
        options: dict[str, Any] = {"vllm_config": own}
        if "vllm_config" not in inspect.signature(layer_class).parameters:
            options = {
                "config": own.model_config.hf_config,
                "cache_config": own.cache_config,
                "quant_config": own.quant_config,
            }
        layers[str(i)] = layer_class(**options, prefix=f"model.layers.{i}")
    return layers


def _within(vllm_config: VllmConfig, window: int | None) -> VllmConfig:
    """The config of a layer with an attention window of its own.

    Of vLLM's layers not all know ``layer_types``, but all ask the cache's config.
    """
    own = copy.copy(vllm_config)
    own.cache_config = copy.copy(vllm_config.cache_config)
    own.cache_config.sliding_window = window
    return own


class RevMuxDecoderForSequenceClassification(RevMuxForSequenceClassification):
    """Read at the last token by the backbone's ``score``, or by label words."""

    # A prompt longer than a step runs in chunks, by itself; see engine/scheduler.py. Declared here
    # and not in the base class: vLLM keeps what it reads off a class under its own file's hash.
    attn_type: ClassVar[str] = "decoder"
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    weights_mapper = LlamaModel.hf_to_vllm_mapper

    embeddings_name = "model.embed_tokens.weight"
    parts: ClassVar[Parts]

    def build(self, vllm_config: VllmConfig) -> list[list[Any]]:
        parts = self.parts
        with set_model_tag("revmux_lower"):
            self.lower = LowerTrunk(vllm_config=vllm_config, parts=parts, num_layers=self.bounds[0])
        self.upper = self.segments(
            lambda indices: UpperTrunk(vllm_config=vllm_config, parts=parts, indices=indices)
        )
        self.build_score(vllm_config)
        return [
            [layer.get_submodule("self_attn.attn") for layer in part.layers.values()]
            for part in self.upper
        ]

    def weight_names(self) -> WeightsMapper:
        return WeightsMapper(
            orig_to_new_prefix={
                **self.layer_prefixes("model.layers"),
                "model.embed_tokens.": "lower.embed_tokens.",
                "model.norm.": f"upper.{len(self.upper) - 1}.norm.",
                "lm_head.": None,  # of it the words' rows are ``score``
            }
        )


class RevMuxLlamaForSequenceClassification(RevMuxDecoderForSequenceClassification):
    parts = Parts(LlamaDecoderLayer)


class RevMuxMistralForSequenceClassification(RevMuxDecoderForSequenceClassification):
    parts = Parts(MistralDecoderLayer)


class RevMuxMinistralForSequenceClassification(RevMuxDecoderForSequenceClassification):
    """Mistral whose layers differ in their windows; vLLM's layer knows both."""

    parts = Parts(MistralDecoderLayer)


class RevMuxQwen2ForSequenceClassification(RevMuxDecoderForSequenceClassification):
    parts = Parts(Qwen2DecoderLayer)


class RevMuxQwen3ForSequenceClassification(RevMuxDecoderForSequenceClassification):
    parts = Parts(Qwen3DecoderLayer)


class RevMuxGemmaForSequenceClassification(RevMuxDecoderForSequenceClassification):
    parts = Parts(GemmaDecoderLayer, GemmaRMSNorm, scales_embeddings=True)


class RevMuxGemma3TextForSequenceClassification(RevMuxDecoderForSequenceClassification):
    parts = Parts(Gemma3DecoderLayer, GemmaRMSNorm, scales_embeddings=True)
