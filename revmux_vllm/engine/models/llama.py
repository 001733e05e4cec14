"""LLaMA classifier whose upper layers run on composites.

vLLM's own decoder layers in two compiled trunks, since lower and upper layers see different
numbers of rows (models/gemma3n.py does the same). What lies between and after them is plain
PyTorch over the indices of the step's ``MuxLayout``.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import pooler_for_classify
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader

from revmux_vllm import checkpoint
from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.attention import composite_attention_backend, enter_upper_layers
from revmux_vllm.engine.layout import MuxLayout


@support_torch_compile
class LowerTrunk(nn.Module):
    """Embedding and prefill layers: one row per token of the batch."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, num_layers: int) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        self.layers = _layers(vllm_config, prefix, range(num_layers))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers.values():
            hidden, residual = layer(positions, hidden, residual)
        return hidden + residual


@support_torch_compile
class UpperTrunk(nn.Module):
    """The remaining layers and the final norm: one row per upper row."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, first_layer: int) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.layers = _layers(vllm_config, prefix, range(first_layer, config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        residual = None
        for layer in self.layers.values():
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


def _layers(vllm_config: VllmConfig, prefix: str, indices: range) -> nn.ModuleDict:
    """Decoder layers under the names that the backbone's checkpoint gives them."""
    return nn.ModuleDict(
        {
            str(i): LlamaDecoderLayer(vllm_config=vllm_config, prefix=f"{prefix}.layers.{i}")
            for i in indices
        }
    )


class RevMuxLlamaForSequenceClassification(nn.Module, SupportsQuant):
    """Backbone, adapters and vLLM's own pooler with the backbone's head."""

    is_pooling_model: ClassVar[bool] = True
    # A composite must run whole, as an encoder's sequence must; see engine/model_config.py.
    attn_type: ClassVar[str] = "encoder_only"
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        hf_config = model_config.hf_config
        self.revmux = RevMuxConfig.from_dict(hf_config.revmux)
        cut = self.revmux.prefill_layers
        with set_model_tag("revmux_lower"):
            self.lower = LowerTrunk(vllm_config=vllm_config, prefix="model", num_layers=cut)
        with set_model_tag("revmux_upper"):
            self.upper = UpperTrunk(vllm_config=vllm_config, prefix="model", first_layer=cut)
        self.upper_layer_names: list[str] = []
        for layer in self.upper.layers.values():
            attention: Any = layer.get_submodule("self_attn.attn")
            attention.attn_backend = composite_attention_backend(attention.attn_backend)
            self.upper_layer_names.append(attention.layer_name)
        device = torch.empty(0).device
        with torch.device("meta"):
            adapters = AdapterLadder(self.revmux, hf_config.hidden_size)
        self.adapters = adapters.to_empty(device=device)
        self.score = ReplicatedLinear(
            hf_config.hidden_size,
            hf_config.num_labels,
            bias=False,
            params_dtype=model_config.head_dtype,
            return_bias=False,
            prefix="score",
        )
        pooler_config = model_config.pooler_config
        assert pooler_config is not None
        self.pooler = DispatchPooler(
            {"classify": pooler_for_classify(pooler_config, classifier=self.score)}
        )
        self.secondary_weights: list[DefaultModelLoader.Source] = []
        if self.revmux.backbone is not None:
            self.secondary_weights.append(
                DefaultModelLoader.Source(
                    checkpoint.backbone_folder(model_config.model), revision=None
                )
            )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids (num_tokens,) to embeddings (num_tokens, D)."""
        return self.lower.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        """Hidden states (num_tokens, D); of a composite's member only the pooled row is set."""
        hidden = self.lower(input_ids, positions)
        layout = enter_upper_layers(self.upper_layer_names)
        if layout is None:
            return self.upper(hidden, positions)
        out = self.upper(self.multiplex(hidden, layout), layout.positions)
        return self.demultiplex(out, hidden, layout)

    def multiplex(self, hidden: Tensor, layout: MuxLayout) -> Tensor:
        """Token rows (num_tokens, D) to upper rows (U, D)."""
        parts = [hidden[layout.alone]]
        padded = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[-1])])
        for part in layout.rungs:
            adapter = self.adapters[part.rung]
            source = padded
            if adapter.merger is not None:
                source = adapter.merger(padded[part.tokens], part.merged)
            if adapter.mux is None:
                parts.append(source)
                continue
            if adapter.merger is not None:
                source = torch.cat([source, padded[-1:]])
            parts.append(adapter.mux.multiplex(source[part.rows], part.present))
        return torch.cat(parts)

    def demultiplex(self, out: Tensor, hidden: Tensor, layout: MuxLayout) -> Tensor:
        """Upper rows (U, D) back to token rows (num_tokens, D), each at its owner's place."""
        result = torch.zeros_like(hidden)
        result[layout.alone] = out[: len(layout.alone)]
        if not layout.rungs:
            return result
        lengths = layout.sequence_lengths
        # Summed in float32 as the reference does; in half precision the order would show.
        total = torch.zeros(len(lengths), hidden.shape[-1], device=hidden.device)
        total.index_add_(0, layout.sequence_of_token, hidden.float())
        mean = (total / lengths[:, None]).to(hidden.dtype)
        skip = torch.stack([hidden[layout.pooled_token], mean], dim=1)  # (B, 2, D)
        for part in layout.rungs:
            adapter = self.adapters[part.rung]
            vectors = adapter.read(out[part.read_at], part.stream, skip[part.sequence])
            result[layout.pooled_token[part.sequence]] = vectors
        return result

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Backbone and adapters from one stream; the names decide which is which."""
        loader = AutoWeightsLoader(self)
        return loader.load_weights(
            ((self._own_name(name), weight) for name, weight in weights),
            mapper=LlamaModel.hf_to_vllm_mapper,
        )

    def _own_name(self, name: str) -> str:
        if name.startswith(checkpoint.KEY_PREFIX):
            return "adapters." + name.removeprefix(checkpoint.KEY_PREFIX)
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            trunk = "lower" if index < self.revmux.prefill_layers else "upper"
            return name.replace("model", trunk, 1)
        return name.replace("model.embed_tokens", "lower.embed_tokens").replace(
            "model.norm", "upper.norm"
        )
