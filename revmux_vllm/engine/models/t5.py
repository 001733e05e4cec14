"""T5, which vLLM has not: transformers' own layers over sequences padded to similar lengths.

Its attention carries a bias by relative position, which paged kernels have no room for. So the
layers are those of the reference (``T5Backbone``): the encoder's lower part on every sequence, its
upper part and one decoder step on composites. Nothing is kept between steps. One attention of vLLM
stands in the model, unused, because the step's layout comes with attention metadata.
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm import checkpoint
from revmux_vllm.backbones.base import batches_by_length
from revmux_vllm.backbones.loading import output_scale
from revmux_vllm.backbones.t5 import T5Backbone
from revmux_vllm.engine.layout import A
from revmux_vllm.engine.models.base import Layout, RevMuxForSequenceClassification
from revmux_vllm.engine.transfer import sent

TOKENS_PER_BATCH = 8192


class RevMuxT5ForSequenceClassification(RevMuxForSequenceClassification):
    """Read at the decoder's only position, by label words."""

    embeddings_name = "shared.weight"
    reads_sequences = True
    weights_mapper = WeightsMapper()

    def build(self, vllm_config: VllmConfig) -> list[list[Any]]:
        hf_config = vllm_config.model_config.hf_config
        # One matrix of embeddings: vLLM unties them where it finds another LM head in the files.
        tied = copy.copy(hf_config)
        tied.tie_word_embeddings = True
        self.t5 = T5ForConditionalGeneration(tied)
        self.build_score(vllm_config)
        # Shares the modules of ``t5``; not registered, or every weight would have two names.
        self._cut = (T5Backbone(self.t5, self.bounds[0], self.score),)
        self.words_scale = output_scale(hf_config)
        return [[EncoderOnlyAttention(1, 64, 1.0, prefix="layout.attn")]]

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

    def run_lower(self, input_ids: Tensor, positions: Tensor, layout: Layout | None) -> Tensor:
        (cut,) = self._cut
        lengths = _some_lengths(input_ids) if layout is None else layout.host_sequence_lengths
        return _by_length(cut.lower, input_ids, lengths)

    def run_segment(
        self, part: int, rows: Tensor, positions: Tensor, layout: Layout | None
    ) -> Tensor:
        (cut,) = self._cut
        first, last = self.bounds[part : part + 2]

        def run(padded: Tensor, lengths: Tensor) -> Tensor:
            states = cut.between(padded, lengths, None, first, last)
            if last < self.num_layers:
                return states
            return cut.finish(states, lengths).expand(-1, padded.shape[1], -1)

        if layout is None:
            lengths = _some_lengths(rows)
        elif layout.rungs:
            lengths = np.diff(layout.host_starts[: layout.passing(first)[0] + 1])
        else:  # all alone: the rows are the batch's own, in its order and not in the plan's
            lengths = layout.host_sequence_lengths
        return _by_length(run, rows, lengths)


@dataclass(frozen=True)
class _Batch(Generic[A]):
    """Sequences that are padded together to b times T.

    Attributes:
        index: (b, T) row of every token; of padding the first of its sequence.
        lengths: (b,) of the sequences.
        rows: (n,) rows of all their tokens.
        places: (n,) of those tokens among the b times T.
    """

    index: A
    lengths: A
    rows: A
    places: A


def _some_lengths(rows: Tensor) -> np.ndarray:
    """For profiling, which has no sequences."""
    return np.bincount(np.arange(len(rows)) // 64)


def _by_length(
    run: Callable[[Tensor, Tensor], Tensor], rows: Tensor, lengths: np.ndarray
) -> Tensor:
    """``run`` over sequences that lie one after the other in ``rows``, padded in batches.

    Args:
        run: padded rows (b, T, ...) and lengths (b,) to (b, T, D).
        rows: (total rows, ...); what lies behind the sequences is padding, and comes back as zeros.
        lengths: (B,), none of them 0.
    """
    starts = np.cumsum(lengths) - lengths
    batches = []
    for chosen in batches_by_length(torch.from_numpy(lengths), TOKENS_PER_BATCH):
        own, first = lengths[chosen.numpy()], starts[chosen.numpy()][:, None]
        place = np.arange(own.max())
        there = place < own[:, None]  # (b, T)
        index = first + np.where(there, place, 0)
        batches.append(_Batch(index, own, index[there], np.flatnonzero(there)))
    result: Tensor | None = None
    for batch in sent(tuple(batches), rows.device):
        out = run(rows[batch.index], batch.lengths).flatten(0, 1)
        if result is None:
            result = out.new_zeros(len(rows), out.shape[-1])
        result[batch.rows] = out[batch.places]
    assert result is not None
    return result
