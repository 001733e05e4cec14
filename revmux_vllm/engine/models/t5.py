"""T5, which vLLM has not: transformers' own layers over sequences padded to similar lengths.

Its attention carries a bias by relative position, which paged kernels have no room for. So the
layers are those of the reference (``T5Backbone``): the encoder's lower part on every sequence, its
upper part and one decoder step on composites. Nothing is kept between steps. One attention of vLLM
stands in the model, unused, because the step's layout comes with attention metadata.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm.backbones.base import inside
from revmux_vllm.backbones.t5 import T5Backbone
from revmux_vllm.engine.attention import enter_upper_layers
from revmux_vllm.engine.models.base import RevMuxForSequenceClassification

TOKENS_PER_BATCH = 8192
SHORTEST = 0.8  # of a batch's longest sequence; what is shorter waits for the next batch


class RevMuxT5ForSequenceClassification(RevMuxForSequenceClassification):
    """Read at the decoder's only position, by label words."""

    embeddings_name = "shared.weight"
    weights_mapper = WeightsMapper()

    def build(self, vllm_config: VllmConfig, prefill_layers: int) -> list[Any]:
        hf_config = vllm_config.model_config.hf_config
        self.t5 = T5ForConditionalGeneration(hf_config)
        self.build_score(vllm_config)
        # Shares the modules of ``t5``; not registered, or every weight would have two names.
        self._cut = (T5Backbone(self.t5, prefill_layers, self.score),)
        if getattr(hf_config, "scale_decoder_outputs", False):
            self.words_scale = hf_config.hidden_size**-0.5
        return [EncoderOnlyAttention(1, 64, 1.0, prefix="layout.attn")]

    def own_name(self, name: str) -> str:
        # Google's own files have one bias too many, which no layer reads.
        return "" if "EncDecAttention.relative_attention_bias" in name else f"t5.{name}"

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids (num_tokens,) to embeddings (num_tokens, D)."""
        embedded: Tensor = self.t5.shared(input_ids)
        return embedded

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        """Hidden states (num_tokens, D), of which only pooled rows are set."""
        (cut,) = self._cut
        layout = enter_upper_layers(self.upper_layer_names)
        if layout is None:  # profiling: any sequences will do
            lengths = torch.arange(len(input_ids)).div(64, rounding_mode="floor").bincount()
            return _by_length(cut.lower, input_ids, lengths, positions)
        hidden = _by_length(cut.lower, input_ids, layout.sequence_lengths.cpu(), positions)

        def decided(rows: Tensor, lengths: Tensor) -> Tensor:
            return cut.upper(rows, lengths).expand(-1, rows.shape[1], -1)

        rows = self.multiplex(hidden, layout)
        out = _by_length(decided, rows, layout.starts.diff(), positions)
        return self.demultiplex(out, hidden, layout)


def _by_length(
    run: Callable[[Tensor, Tensor], Tensor], rows: Tensor, lengths: Tensor, like: Tensor
) -> Tensor:
    """``run`` over sequences that lie one after the other in ``rows``, padded in batches.

    Args:
        run: padded rows (B, T, ...) and lengths (B,) to (B, T, D).
        rows: (total rows, ...).
        lengths: (B,) on the CPU.
        like: on the device of ``rows``.
    """
    starts = lengths.cumsum(0) - lengths
    result: Tensor | None = None
    for batch in _batches(lengths):
        own = lengths[batch]
        there = inside(own, int(own.max()))  # (b, T)
        index = (starts[batch, None] + torch.arange(there.shape[1])) * there
        index, there = index.to(like.device), there.to(like.device)
        out = run(rows[index], own.to(like.device))
        if result is None:
            result = out.new_zeros(len(rows), out.shape[-1])
        result[index[there]] = out[there]
    assert result is not None
    return result


def _batches(lengths: Tensor) -> Iterator[Tensor]:
    """Sequences of similar length, longest first."""
    order = lengths.argsort(descending=True)
    begin = 0
    for end in range(1, len(order) + 1):
        longest = int(lengths[order[begin]])
        full = end < len(order) and (
            (end - begin + 1) * longest > TOKENS_PER_BATCH
            or int(lengths[order[end]]) < SHORTEST * longest - 4
        )
        if full or end == len(order):
            yield order[begin:end]
            begin = end
