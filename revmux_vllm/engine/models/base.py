"""A classifier whose upper layers run on composites: what all families share.

A family brings two compiled trunks of vLLM's own layers, since lower and upper layers see different
numbers of rows (models/gemma3n.py does the same), and its head. What lies between and after the
trunks is plain PyTorch over the indices of the step's ``MuxLayout``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import pooler_for_classify
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from revmux_vllm import checkpoint
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.loading import label_tokens
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.attention import composite_attention_backend, enter_upper_layers
from revmux_vllm.engine.layout import MuxLayout
from revmux_vllm.engine.stages import DEMULTIPLEX, LOWER, MULTIPLEX, UPPER, clock
from revmux_vllm.families import family_of


def classify_pooler(
    vllm_config: VllmConfig, classifier: Any, pooling: Any = None
) -> DispatchPooler:
    """vLLM's pooler for ``classify``, and for nothing by token: of members one row is known."""
    config = vllm_config.model_config.pooler_config
    assert config is not None
    return DispatchPooler(
        {"classify": pooler_for_classify(config, pooling=pooling, classifier=classifier)}
    )


class RevMuxForSequenceClassification(nn.Module, SupportsQuant, ABC):
    """Backbone, adapters and vLLM's own pooler with the backbone's head.

    Attributes:
        weights_mapper: vLLM's own for the backbone's layers.
        word_tokens: tokens of the label words, whose rows of the LM head are ``score``; or empty.
        lower: token ids and positions to hidden states; has ``embed_input_ids``. A family whose
            trunks are no modules overrides ``run_lower``, ``run_upper`` and ``embed_input_ids``.
        upper: rows and positions to final states.
        pooler: vLLM's.
        embeddings_name: of the token embeddings in the backbone's checkpoint; they are the LM head
            where it has no weights of its own.
        words_scale: see ``LabelWords``.
    """

    is_pooling_model: ClassVar[bool] = True
    score_type: ClassVar[str] = "cross-encoder"  # /score and /rerank, where there is one label
    # A composite must run whole, as an encoder's sequence must; see engine/model_config.py.
    attn_type: ClassVar[str] = "encoder_only"
    weights_mapper: ClassVar[WeightsMapper]
    lower: Any
    upper: Any
    pooler: DispatchPooler
    embeddings_name: ClassVar[str] = ""
    words_scale = 1.0

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        hf_config = model_config.hf_config
        self.revmux = RevMuxConfig.from_dict(hf_config.revmux)
        self.word_tokens: list[int] = []
        if self.revmux.label_words:
            tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer)
            self.word_tokens = label_tokens(tokenizer, self.revmux.label_words)
        self.num_layers = hf_config.num_hidden_layers
        pools_first = family_of(hf_config.model_type).pools_first
        self.upper_layer_names: list[str] = []
        for attention in self.build(vllm_config, self.revmux.prefill_layers):
            attention.attn_backend = composite_attention_backend(
                attention.attn_backend, pools_first
            )
            self.upper_layer_names.append(attention.layer_name)
        here = torch.empty(0)
        with torch.device("meta"):
            adapters = AdapterLadder(self.revmux, hf_config.hidden_size)
        # Never narrower than they were trained, whatever the backbone is served in.
        self.adapter_dtype = here.dtype
        if vllm_config.load_config.load_format != "dummy":
            stored = checkpoint.adapter_dtype(model_config.model)
            self.adapter_dtype = torch.promote_types(stored, here.dtype)
        self.adapters = adapters.to(self.adapter_dtype).to_empty(device=here.device)
        # Named, since vLLM passes over a file that a sharded backbone's index does not list.
        self.secondary_weights = [
            DefaultModelLoader.Source(
                model_config.model,
                revision=model_config.revision,
                allow_patterns_overrides=[checkpoint.ADAPTER_FILE],
            )
        ]
        if self.revmux.backbone is not None:
            self.secondary_weights.append(
                DefaultModelLoader.Source(
                    checkpoint.backbone_folder(model_config.model), revision=None
                )
            )

    @abstractmethod
    def build(self, vllm_config: VllmConfig, prefill_layers: int) -> list[Any]:
        """Set the layers, the head and ``pooler``; return the attentions of the upper layers."""

    def build_score(self, vllm_config: VllmConfig) -> None:
        """Set ``score``, a linear head without bias, and the ``pooler`` that reads it."""
        model_config = vllm_config.model_config
        self.score = ReplicatedLinear(
            model_config.hf_config.hidden_size,
            model_config.hf_config.num_labels,
            bias=False,
            params_dtype=model_config.head_dtype,
            return_bias=False,
            prefix="score",
        )
        self.pooler = classify_pooler(vllm_config, self.score)

    @abstractmethod
    def weight_names(self) -> WeightsMapper:
        """Names in the backbone's checkpoint to names here."""

    def layer_prefixes(self, prefix: str) -> dict[str, str]:
        """Of every layer, whose names in the checkpoint begin with ``prefix`` and its number."""
        trunk = ["lower"] * self.revmux.prefill_layers + ["upper"] * self.num_layers
        return {f"{prefix}.{i}.": f"{trunk[i]}.layers.{i}." for i in range(self.num_layers)}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids (num_tokens,) to embeddings (num_tokens, D)."""
        embedded: Tensor = self.lower.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (num_tokens, D); of a composite's member only the pooled row is set."""
        clock.start()
        layout = enter_upper_layers(self.upper_layer_names)
        self.set_token_type_ids(input_ids, token_type_ids, layout)
        hidden = self.run_lower(input_ids, positions, layout)
        clock.mark(LOWER)
        if layout is None:
            out = self.run_upper(hidden, positions, None)
            clock.mark(UPPER)
            clock.finish(len(hidden), len(out))
            return out
        out = hidden[:0]
        if layout.num_rows:  # not where all exit
            rows = self.multiplex(hidden, layout)
            clock.mark(MULTIPLEX)
            out = self.run_upper(rows, layout.positions, layout)
            clock.mark(UPPER)
        result = self.demultiplex(out, hidden, layout)
        clock.mark(DEMULTIPLEX)
        clock.finish(len(hidden), len(out))
        return result

    def set_token_type_ids(
        self, input_ids: Tensor, token_type_ids: Tensor | None, layout: MuxLayout | None
    ) -> None:
        """Write into ``input_ids`` which text of a pair each token is of; here nothing is."""

    def run_lower(self, input_ids: Tensor, positions: Tensor, layout: MuxLayout | None) -> Tensor:
        """Tokens to prefill states (num_tokens, D); ``layout`` is None while vLLM profiles."""
        hidden: Tensor = self.lower(input_ids, positions)
        return hidden

    def run_upper(self, rows: Tensor, positions: Tensor, layout: MuxLayout | None) -> Tensor:
        """Upper rows (U, D) to final states (U, D)."""
        out: Tensor = self.upper(rows, positions)
        return out

    def multiplex(self, hidden: Tensor, layout: MuxLayout) -> Tensor:
        """Token rows (num_tokens, D) to upper rows (U, D)."""
        parts = [hidden[layout.alone]]
        padded = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[-1])]).to(self.adapter_dtype)
        for part in layout.rungs:
            adapter, source = self.adapters[part.rung], padded
            if part.tokens is not None and part.merged is not None:
                source = adapter.merge(padded[part.tokens], part.merged)
                if part.rung.mux > 1:  # where a member has ended, its row is the zero row
                    source = torch.cat([source, padded[-1:]])
            rows, _ = adapter.multiplex(source[part.rows], part.present)
            parts.append(rows.to(hidden.dtype))
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
        parts = [hidden[layout.pooled_token], total / lengths[:, None]]
        skip = torch.stack([part.to(self.adapter_dtype) for part in parts], dim=1)  # (B, 2, D)
        for part in layout.rungs:
            read = None if part.read_at is None else out[part.read_at].to(self.adapter_dtype)
            vectors = self.adapters[part.rung].read(read, part.stream, skip[part.sequence])
            result[layout.pooled_token[part.sequence]] = vectors.to(hidden.dtype)
        return result

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Backbone and adapters from one stream; the names decide which is which."""
        adapters = WeightsMapper(orig_to_new_prefix={checkpoint.KEY_PREFIX: "adapters."})
        mapper = self.weight_names() | self.weights_mapper | adapters
        return AutoWeightsLoader(self).load_weights(self._prepared(weights), mapper=mapper)

    def _prepared(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Adapters in their dtype, and the label words' rows of the LM head as ``score``."""
        rows: dict[str, Tensor] = {}
        for name, weight in weights:
            if name.startswith(checkpoint.KEY_PREFIX):
                yield name, weight.to(self.adapter_dtype)
                continue
            if self.word_tokens and name in ("lm_head.weight", self.embeddings_name):
                rows[name] = weight[self.word_tokens]
            yield name, weight
        if self.word_tokens:
            name = "lm_head.weight" if "lm_head.weight" in rows else self.embeddings_name
            yield "score.weight", rows[name] * self.words_scale
