"""A classifier whose upper layers run on composites: what all families share.

A family brings compiled trunks of vLLM's own layers, since lower and upper layers see different
numbers of rows (models/gemma3n.py does the same), and its head. The upper layers are cut once more
wherever a rung of the checkpoint stops. What lies between and after the trunks is plain PyTorch
over the indices of the step's ``MuxLayout``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from revmux_vllm import checkpoint
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.loading import label_tokens
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.attention import (
    composite_attention_backend,
    enter_upper_layers,
    enter_with_fewer,
    tell_windows_apart,
)
from revmux_vllm.engine.graphs import UpperGraphs
from revmux_vllm.engine.layout import MuxLayout, RungLayout, make_layout, pooled_and_mean
from revmux_vllm.engine.leaving import Leaving
from revmux_vllm.engine.model_config import served_options
from revmux_vllm.engine.model_state import model_state_class
from revmux_vllm.engine.models.names import BackboneNames
from revmux_vllm.engine.models.parts import adapter_dtype, classify_pooler
from revmux_vllm.engine.prefixes import PrefixStates
from revmux_vllm.engine.stages import DEMULTIPLEX, LOWER, MULTIPLEX, UPPER, clock
from revmux_vllm.engine.transfer import sent
from revmux_vllm.families import family_of

Layout = MuxLayout[Tensor]
"""Of one step, on the device."""
WARM_UP_TOKENS = 16
"""Of every sequence that a rung is warmed up with."""


class RevMuxForSequenceClassification(nn.Module, SupportsQuant, ABC):
    """Backbone, adapters and vLLM's own pooler with the backbone's head.

    Attributes:
        weights_mapper: vLLM's own for the backbone's layers.
        word_tokens: tokens of the label words, whose rows of the LM head are ``score``; or empty.
        bounds: the cut, every layer after which a rung stops, and the number of layers.
        lower: token ids and positions to hidden states; has ``embed_input_ids``. A family whose
            trunks are no modules overrides ``run_lower``, ``run_segment`` and ``embed_input_ids``.
        upper: rows and positions to hidden states, between every two of ``bounds``; the last to
            final states.
        pooler: vLLM's.
        embeddings_name: of the token embeddings in the backbone's checkpoint; they are the LM head
            where it has no weights of its own.
        words_scale: see ``LabelWords``.
        reads_sequences: whether the layout is needed also where all run alone.
        contract: by which busy steps let sequences leave; or None.
        prefixes: what prefixes in the cache leave beside keys and values; None before the first
            step, and where no prefixes are kept.
    """

    is_pooling_model: ClassVar[bool] = True
    score_type: ClassVar[str] = "cross-encoder"  # /score and /rerank, where there is one label
    # A sequence runs whole unless a family knows better; see engine/model_config.py.
    attn_type: ClassVar[str] = "encoder_only"
    weights_mapper: ClassVar[WeightsMapper]
    lower: Any
    upper: Any
    pooler: DispatchPooler
    embeddings_name: ClassVar[str] = ""
    words_scale = 1.0
    reads_sequences = False
    prefixes: PrefixStates | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.hf_config = hf_config = model_config.hf_config
        self.revmux = RevMuxConfig.from_dict(hf_config.revmux)
        self.word_tokens: list[int] = []
        if self.revmux.label_words:
            tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer)
            self.word_tokens = label_tokens(tokenizer, self.revmux.label_words)
        self.num_layers = hf_config.num_hidden_layers
        self.hidden_size = hf_config.hidden_size
        family = family_of(hf_config.model_type)
        self.ends, self.has_kv_cache = family.ends, family.has_kv_cache
        stops = {rung.stop for rung in self.revmux.rungs if rung.stop}
        self.bounds = [self.revmux.prefill_layers, *sorted(stops), self.num_layers]
        options = served_options(vllm_config)
        self.contract, self.shadow_rate = options.contract, options.shadow_rate
        self.cache_config = vllm_config.cache_config
        tail = None
        if self.cache_config.enable_prefix_caching and self.has_kv_cache:
            tail = max((rung.shortening for rung in self.revmux.rungs), default=1) - 1
            # A contract's sequences begin behind prefixes that others computed alone.
            self.reads_sequences = self.contract is not None
        self.tail = tail
        self.upper_layer_names: dict[int, list[str]] = {}
        parts = self.build(vllm_config)
        tell_windows_apart(self)
        for first, attentions in zip(self.bounds, parts, strict=False):
            for attention in attentions:
                attention.attn_backend = composite_attention_backend(
                    attention.attn_backend, first, self.ends, self.reads_sequences, tail
                )
            self.upper_layer_names[first] = [attention.layer_name for attention in attentions]
        self.shadow_draws = np.random.default_rng(0)
        self.trusts: list[tuple[Tensor, Tensor]] = []
        most = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.upper_graphs = UpperGraphs(most, self.hidden_size)
        here = torch.empty(0)
        with torch.device("meta"):
            adapters = AdapterLadder(self.revmux, hf_config.hidden_size)
        self.adapter_dtype = adapter_dtype(vllm_config, self.revmux, here)
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
    def build(self, vllm_config: VllmConfig) -> list[list[Any]]:
        """Set the layers, the head and ``pooler``; return the attentions of the upper layers,
        between every two of ``bounds``."""

    def segments(self, make: Callable[[range], nn.Module]) -> nn.ModuleList:
        """The upper layers in parts, each compiled by itself.

        Args:
            make: the trunk of some layers.
        """
        parts = []
        for first, last in pairwise(self.bounds):
            with set_model_tag(f"revmux_upper_{first}"):
                parts.append(make(range(first, last)))
        return nn.ModuleList(parts)

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

    def answer(self, vectors: Tensor) -> Tensor:
        """Vectors (M, D) that the head reads to logits (M, C), as ``pooler`` makes them."""
        return self.score(vectors.to(self.score.weight.dtype))

    @abstractmethod
    def weight_names(self) -> WeightsMapper:
        """Names in the backbone's checkpoint to names here."""

    def layer_prefixes(self, prefix: str) -> dict[str, str]:
        """Of every layer, whose names in the checkpoint begin with ``prefix`` and its number."""
        trunks = ["lower"] * self.revmux.prefill_layers
        for part, (first, last) in enumerate(pairwise(self.bounds)):
            trunks += [f"upper.{part}"] * (last - first)
        return {f"{prefix}.{i}.": f"{trunk}.layers.{i}." for i, trunk in enumerate(trunks)}

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
        clock.start(input_ids.device)
        layout = enter_upper_layers(self.upper_layer_names, self.upper_graphs.padded_size)
        self.set_token_type_ids(input_ids, token_type_ids, layout)
        hidden = self.run_lower(input_ids, positions, layout)
        clock.mark(LOWER)
        if layout is not None and layout.paging is not None:
            self.keep_prefixes(hidden, layout)
        if layout is None or not layout.rungs:
            for part in range(len(self.bounds) - 1):
                hidden = self.run_segment(part, hidden, positions, layout)
                if layout is not None and self.prefixes is not None and layout.paging is not None:
                    tokens = hidden[: layout.num_tokens]
                    self.prefixes.add_tokens(self.bounds[part + 1], tokens, layout.paging)
            clock.mark(UPPER)
            clock.finish(len(hidden), len(hidden))
            return hidden
        # All that is read of the lower layers' states, before the upper layers run: the graphs of
        # both trunks share their memory.
        skip = self.skip_state(hidden, layout)  # (B, 2, D)
        read: list[Tensor | None] = [None] * len(layout.rungs)
        alone, mean_rows = hidden[:0], 0.0
        leaving: Leaving | None = None
        if layout.num_rows:  # not where all exit
            rows = self.multiplex(hidden, layout)
            clock.mark(MULTIPLEX)
            if layout.rungs[0].rung.sure:
                leaving = self.leaving(layout, skip, rows)
                alone, mean_rows = self.run_until_sure(rows, leaving)
                read[0] = leaving.vectors
            else:
                alone, mean_rows = self.run_upper(rows, layout, read)
            clock.mark(UPPER)
        result = self.demultiplex(alone, read, skip, len(hidden), layout)
        clock.mark(DEMULTIPLEX)
        told = () if leaving is None else (leaving.left, leaving.shadows, leaving.trusts)
        clock.finish(layout.num_tokens, mean_rows, *told)
        return result

    def set_token_type_ids(
        self, input_ids: Tensor, token_type_ids: Tensor | None, layout: Layout | None
    ) -> None:
        """Write into ``input_ids`` which text of a pair each token is of; here nothing is."""

    def run_lower(self, input_ids: Tensor, positions: Tensor, layout: Layout | None) -> Tensor:
        """Tokens to prefill states (num_tokens, D); ``layout`` is None while vLLM profiles."""
        hidden: Tensor = self.lower(input_ids, positions)
        return hidden

    def keep_prefixes(self, hidden: Tensor, layout: Layout) -> None:
        """Of the tokens at the cut (num_tokens, D), what others who begin with them will need."""
        paging = layout.paging
        assert paging is not None
        assert self.tail is not None
        if self.prefixes is None:
            blocks = self.cache_config.num_gpu_blocks
            assert blocks is not None
            # Attention may see a block of the cache as several of its own.
            blocks *= self.cache_config.block_size // paging.size
            self.prefixes = PrefixStates(blocks, hidden, self.bounds[:-1], self.tail)
        tokens = hidden[: layout.num_tokens]
        self.prefixes.add_tokens(self.bounds[0], tokens, paging)
        self.prefixes.keep_tails(tokens, paging)

    def run_upper(
        self, rows: Tensor, layout: Layout, read: list[Tensor | None]
    ) -> tuple[Tensor, float]:
        """Upper rows (U, D) as far as each of them goes.

        Args:
            rows: of the composites of ``layout``.
            layout: of the step.
            read: filled with the states (M, D) at which the members of every rung are read.

        Returns:
            Final states of those that run alone, and how many rows a layer had on average.
        """
        row_layers = 0
        for part, (first, last) in enumerate(pairwise(self.bounds)):
            num_rows = layout.passing(first)[1]
            if not num_rows:
                break
            rows = self.run_segment(part, rows[:num_rows], layout.positions[:num_rows], layout)
            row_layers += num_rows * (last - first)
            if self.prefixes is not None and layout.paging is not None:
                self.prefixes.add_rows(last, rows, layout.paging)
            # At once, since the graphs of the next part write where this one's rows are.
            for place, rung_layout in enumerate(layout.rungs):
                ends_here = (rung_layout.rung.stop or self.num_layers) == last
                if ends_here:
                    read[place] = self.read_off(rows, rung_layout, layout, last)
        return rows[: len(layout.alone)], row_layers / (self.num_layers - self.bounds[0])

    def read_off(
        self, rows: Tensor, part: RungLayout[Tensor], layout: Layout, layer: int
    ) -> Tensor | None:
        """Where the members of a rung are read after ``layer``: (M, D), (M, 2, D) where
        ``Rung.reads_state``, None where no upper layer ran."""
        if part.read_at is None:
            return None
        if not part.rung.reads_state:
            return rows[part.read_at]
        before = None
        if self.prefixes is not None and layout.paging is not None:
            first = part.first_group
            before = self.prefixes.before_rows(layer, layout.paging)
            before = before[first : first + len(part.read_at)]
        return layout.state(rows, part.read_at, part.first_group, self.adapter_dtype, before)

    def leaving(self, layout: Layout, skip: Tensor, rows: Tensor) -> Leaving:
        """The sequences of a step that are under the contract."""
        assert self.contract is not None, "a step under a contract, and none was asked for"
        if not self.trusts:  # once, for a copy from the host may wait for the device
            terms = zip(self.contract.weights, self.contract.biases, strict=True)
            to: dict[str, Any] = {"dtype": torch.float32, "device": rows.device}
            self.trusts = [(torch.tensor(w, **to), torch.tensor(b, **to)) for w, b in terms]
        # Every rank sees the same steps, and so chooses the same ones.
        shadows = self.shadow_draws.random(len(layout.rungs[0].sequence)) < self.shadow_rate
        return Leaving(self.contract, self, layout, skip, rows, shadows)

    def run_until_sure(self, rows: Tensor, leaving: Leaving) -> tuple[Tensor, float]:
        """``run_upper`` where sequences are under the contract: each leaves as soon as it is sure.

        What they are read from is in ``leaving`` then.
        """
        row_layers, whole = 0, leaving.layout
        for part, (first, last) in enumerate(pairwise(self.bounds)):
            rows = leaving.at(first, rows)
            if not leaving.layout.num_rows:
                break
            if leaving.layout is not whole:
                names = self.upper_layer_names.get(first, [])
                enter_with_fewer(names, leaving.layout, self.upper_graphs.padded_size)
            rows = self.run_segment(part, rows, leaving.layout.positions, leaving.layout)
            row_layers += len(rows) * (last - first)
            if self.prefixes is not None and whole.paging is not None:
                self.prefixes.add_rows(last, rows[: len(whole.alone)], whole.paging)
        return leaving.end(rows), row_layers / (self.num_layers - self.bounds[0])

    def run_segment(
        self, part: int, rows: Tensor, positions: Tensor, layout: Layout | None
    ) -> Tensor:
        """Rows (U, D) through a part of the upper layers; ``layout`` is None while vLLM profiles.

        The rows are of ``layout``'s composites, or the batch's tokens where it has no rungs.
        """
        own = layout is not None and bool(layout.rungs)
        return self.upper_graphs.run(self.upper[part], rows, positions, own)

    def skip_state(self, hidden: Tensor, layout: Layout) -> Tensor:
        """What the lower layers know of every sequence (B, 2, D): its pooled row, and the mean."""
        tokens = hidden[: layout.num_tokens]
        speaks, starts = layout.pooled_token, layout.sequence_starts
        cached = None
        if self.prefixes is not None and (paging := layout.paging) is not None:
            cached = self.prefixes.before_tokens(self.bounds[0], paging), paging.lengths
        return pooled_and_mean(tokens, speaks, starts, self.adapter_dtype, cached)

    def multiplex(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Token rows (num_tokens, D) to upper rows (U, D)."""
        parts = [hidden[layout.alone]]
        if self.prefixes is not None and layout.paging is not None:
            hidden = self.prefixes.with_tails(hidden[: layout.num_tokens], layout.paging)
        converted = hidden.to(self.adapter_dtype)
        for part in layout.rungs:
            if part.rung.sure:
                parts.append(hidden[part.rows[:, 0]])
                continue
            adapter, source = self.adapters[part.rung], converted
            if part.tokens is not None and part.merged is not None:
                source = adapter.path.merge(converted[part.tokens], part.merged)
            rows, _ = adapter.path.multiplex(source[part.rows], part.present, part.sinks)
            parts.append(rows.to(hidden.dtype))
        return torch.cat(parts)

    def demultiplex(
        self,
        alone: Tensor,
        read: Sequence[Tensor | None],
        skip: Tensor,
        num_rows: int,
        layout: Layout,
    ) -> Tensor:
        """What ``run_upper`` gives back to token rows (num_rows, D), each at its owner's place."""
        result = skip.new_zeros(num_rows, skip.shape[-1], dtype=alone.dtype)
        result[layout.alone] = alone
        for part, rows in zip(layout.rungs, read, strict=True):
            if part.rung.sure:  # its exits have read them
                assert rows is not None
                result[part.pooled_token] = rows
                continue
            own = None if rows is None else rows.to(self.adapter_dtype)
            vectors = self.adapters[part.rung].read(own, part.stream, skip[part.sequence])
            result[part.pooled_token] = vectors.to(alone.dtype)
        return result

    @torch.inference_mode()
    def warm_up_rungs(self) -> None:
        """Run every rung's adapter once, so that no step pays for its kernels' first use."""
        for rung in self.revmux.rungs:
            starts = np.arange(rung.mux + 1) * WARM_UP_TOKENS
            layout = make_layout([(rung, range(rung.mux))], starts, self.ends)
            there: Layout = sent(layout, self.upper_graphs.rows.device)
            hidden = self.upper_graphs.rows.new_zeros(int(starts[-1]), self.hidden_size)
            skip = self.skip_state(hidden, there)
            rows = self.multiplex(hidden, there) if there.num_rows else hidden[:0]
            read = [self.read_off(rows, there.rungs[0], there, rung.stop)]
            self.demultiplex(hidden[:0], read, skip, len(hidden), there)

    def get_model_state_cls(self) -> type[Any]:
        """Of vLLM's V2 model runner; see ``engine/model_state.py``."""
        return model_state_class(self.has_kv_cache)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Backbone and adapters from one stream; the names decide which is which."""
        adapters = WeightsMapper(orig_to_new_prefix={checkpoint.KEY_PREFIX: "adapters."})
        mapper = self.weight_names() | self.weights_mapper | adapters
        return AutoWeightsLoader(self).load_weights(self._prepared(weights), mapper=mapper)

    def _prepared(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Adapters in their dtype, and the label words' rows of the LM head as ``score``."""
        rows: dict[str, Tensor] = {}
        names = BackboneNames(self.hf_config, self.revmux.label_words)
        for written, weight in weights:
            if written.startswith(checkpoint.KEY_PREFIX):
                yield written, weight.to(self.adapter_dtype)
                continue
            if (name := names.find(written)) is None:
                continue
            if self.word_tokens and name in ("lm_head.weight", self.embeddings_name):
                rows[name] = weight[self.word_tokens]
            yield name, weight
        if self.word_tokens:
            name = "lm_head.weight" if "lm_head.weight" in rows else self.embeddings_name
            score = rows[name] * self.words_scale
            if self.revmux.score_template is not None:
                score = score[1:] - score[:1]
            yield "score.weight", score
