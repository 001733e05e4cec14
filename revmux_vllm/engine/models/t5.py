"""T5, which vLLM has not: transformers' own layers over sequences padded to similar lengths.

Its attention carries a bias by relative position, which paged kernels have no room for. So the
layers are those of the reference (``T5Backbone``): the encoder's lower part on every sequence, its
upper part and one decoder step on composites. Nothing is kept between steps. One attention of vLLM
stands in the model, unused, because the step's layout comes with attention metadata.
"""

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm import checkpoint
from revmux_vllm.backbones.base import batches_by_length, inside
from revmux_vllm.backbones.loading import output_scale
from revmux_vllm.backbones.t5 import T5Backbone
from revmux_vllm.engine.layout import MuxLayout
from revmux_vllm.engine.models.base import RevMuxForSequenceClassification

TOKENS_PER_BATCH = 8192


class RevMuxT5ForSequenceClassification(RevMuxForSequenceClassification):
    """Read at the decoder's only position, by label words."""

    embeddings_name = "shared.weight"
    weights_mapper = WeightsMapper()

    def build(self, vllm_config: VllmConfig, prefill_layers: int) -> list[Any]:
        hf_config = vllm_config.model_config.hf_config
        # One matrix of embeddings: vLLM unties them where it finds another LM head in the files.
        tied = copy.copy(hf_config)
        tied.tie_word_embeddings = True
        self.t5 = T5ForConditionalGeneration(tied)
        self.build_score(vllm_config)
        # Shares the modules of ``t5``; not registered, or every weight would have two names.
        self._cut = (T5Backbone(self.t5, prefill_layers, self.score),)
        self.words_scale = output_scale(hf_config)
        return [EncoderOnlyAttention(1, 64, 1.0, prefix="layout.attn")]

    def weight_names(self) -> WeightsMapper:
        # Of the LM head the words' rows are ``score``, and the module is tied to the embeddings.
        # Google's own files have one bias too many, which no layer reads.
        unread = r"^lm_head\.weight$|EncDecAttention\.relative_attention_bias"
        own = rf"^(?!score\.|{re.escape(checkpoint.KEY_PREFIX)})"
        return WeightsMapper(orig_to_new_regex={re.compile(unread): None, re.compile(own): "t5."})

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """In the engine's dtype, or vLLM would warn of every tensor."""
        return super().load_weights((name, w.to(self.t5.dtype)) for name, w in weights)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids (num_tokens,) to embeddings (num_tokens, D)."""
        embedded: Tensor = self.t5.shared(input_ids)
        return embedded

    def run_lower(self, input_ids: Tensor, positions: Tensor, layout: MuxLayout | None) -> Tensor:
        (cut,) = self._cut
        lengths = _some_lengths(input_ids) if layout is None else layout.sequence_lengths.cpu()
        return _by_length(cut.lower, input_ids, lengths)

    def run_upper(self, rows: Tensor, positions: Tensor, layout: MuxLayout | None) -> Tensor:
        (cut,) = self._cut

        def decided(padded: Tensor, lengths: Tensor) -> Tensor:
            return cut.upper(padded, lengths).expand(-1, padded.shape[1], -1)

        lengths = _some_lengths(rows) if layout is None else layout.starts.diff()
        return _by_length(decided, rows, lengths)


def _some_lengths(rows: Tensor) -> Tensor:
    """For profiling, which has no sequences."""
    return torch.arange(len(rows)).div(64, rounding_mode="floor").bincount()


def _by_length(run: Callable[[Tensor, Tensor], Tensor], rows: Tensor, lengths: Tensor) -> Tensor:
    """``run`` over sequences that lie one after the other in ``rows``, padded in batches.

    Args:
        run: padded rows (B, T, ...) and lengths (B,) to (B, T, D).
        rows: (total rows, ...).
        lengths: (B,) on the CPU.
    """
    starts = lengths.cumsum(0) - lengths
    result: Tensor | None = None
    for batch in batches_by_length(lengths, TOKENS_PER_BATCH):
        own = lengths[batch]
        there = inside(own, int(own.max()))  # (b, T)
        index = (starts[batch, None] + torch.arange(there.shape[1])) * there
        index, there = index.to(rows.device), there.to(rows.device)
        out = run(rows[index], own.to(rows.device))
        if result is None:
            result = out.new_zeros(len(rows), out.shape[-1])
        result[index[there]] = out[there]
    assert result is not None
    return result
