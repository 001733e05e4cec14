"""Where vLLM has no layers: transformers' own, over sequences padded to similar lengths.

Their attention carries a bias by relative position, which paged kernels have no room for. So the
layers are those of the reference (a ``Backbone``): the lower ones on every sequence, the upper ones
on composites, of which every row counts as one position. Nothing is kept between steps. One
attention of vLLM stands in the model, unused, because the step's layout comes with attention
metadata.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm import checkpoint
from revmux_vllm.backbones.base import Backbone, batches_by_length
from revmux_vllm.engine.layout import A
from revmux_vllm.engine.models.base import Layout, RevMuxForSequenceClassification
from revmux_vllm.engine.transfer import sent

TOKENS_PER_BATCH = 8192


class RevMuxPaddedForSequenceClassification(RevMuxForSequenceClassification):
    """A classifier whose layers are those of transformers.

    Attributes:
        model: of transformers, whole.
    """

    model: Any
    reads_sequences = True
    weights_mapper = WeightsMapper()

    @abstractmethod
    def build_backbone(self, vllm_config: VllmConfig) -> Backbone:
        """Set ``model``, the head and ``pooler``; return the model cut."""

    def build(self, vllm_config: VllmConfig) -> list[list[Any]]:
        # Shares the modules of ``model``; not registered, or every weight would have two names.
        self._cut = (self.build_backbone(vllm_config),)
        return [[EncoderOnlyAttention(1, 64, 1.0, prefix="layout.attn")]]

    @property
    def cut(self) -> Backbone:
        """``model`` in two parts."""
        return self._cut[0]

    def weight_names(self) -> WeightsMapper:
        own = rf"^(?!score\.|{re.escape(checkpoint.KEY_PREFIX)})"
        return WeightsMapper(orig_to_new_regex={re.compile(own): "model."})

    def _prepared(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each in the dtype that it is computed in, or vLLM would warn of every tensor."""
        own = self.model.state_dict()
        for name, weight in super()._prepared(weights):
            yield name, weight.to(own[name].dtype) if name in own else weight

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids (num_tokens,) to embeddings (num_tokens, D)."""
        embedded: Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded

    def run_lower(self, input_ids: Tensor, positions: Tensor, layout: Layout | None) -> Tensor:
        lengths = _some_lengths(input_ids) if layout is None else layout.host_sequence_lengths
        return _by_length(self.lower_batch, input_ids, lengths)

    def lower_batch(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Token ids (b, T) of padded sequences to prefill states (b, T, D)."""
        return self.cut.lower(input_ids, lengths)

    def run_segment(
        self, part: int, rows: Tensor, positions: Tensor, layout: Layout | None
    ) -> Tensor:
        first, last = self.bounds[part : part + 2]

        def run(padded: Tensor, lengths: Tensor) -> Tensor:
            states = self.cut.between(padded, lengths, None, first, last)
            if last < self.num_layers:
                return states
            return self.cut.finish(states, lengths).expand(-1, padded.shape[1], -1)

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
