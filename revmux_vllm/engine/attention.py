"""The composite attention backend: any vLLM backend, told that the batch is other sequences.

As ``ChunkedLocalAttention`` does (model_executor/layers/attention/chunked_local_attention.py), the
builder rewrites the batch's ``CommonAttentionMetadata`` and hands it to the backend's own builder.
A composite lives in the pages of its carrier, its longest member, so paged attention is reused as
it is.

Trap: keys and values are *written* through ``ForwardContext.slot_mapping[layer]``, not through the
metadata's slot mapping. ``enter_upper_layers`` replaces those entries too; without it the answers
are garbage at the same speed.
"""

import functools
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from revmux_vllm.engine.layout import MuxLayout, make_layout
from revmux_vllm.engine.worker import current_step


def composite_metadata(
    common: CommonAttentionMetadata, layout: MuxLayout
) -> CommonAttentionMetadata:
    """``common`` with the composites in place of the batch's sequences."""
    device = common.query_start_loc.device
    starts = layout.starts.to(common.query_start_loc.dtype)
    lengths = starts.diff().to(common.seq_lens.dtype)
    longest = int(lengths.max())
    return common.replace(
        query_start_loc=starts.to(device, non_blocking=True),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device, non_blocking=True),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=layout.num_rows,
        max_query_len=longest,
        max_seq_len=longest,
        block_table_tensor=common.block_table_tensor[layout.carriers],
        slot_mapping=common.slot_mapping[layout.carrier_rows],
        positions=layout.places,
        is_prefilling=torch.ones(len(lengths), dtype=torch.bool),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@functools.lru_cache
def composite_attention_backend(
    underlying: type[AttentionBackend], pools_first: bool
) -> type[AttentionBackend]:
    """``underlying`` for upper layers: its metadata carries ``mux_layout``.

    ``pools_first``: the pooled token is a sequence's first one; see ``make_layout``.
    """
    base: Any = underlying.get_builder_cls()
    assert issubclass(base, AttentionMetadataBuilder)

    class CompositeBuilder(base):
        # A cached build could only be reused under another block table, not under another plan.
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(
            cls, vllm_config: VllmConfig, kv_cache_spec: Any
        ) -> AttentionCGSupport:
            return AttentionCGSupport.NEVER

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            step = current_step()
            if step is None:
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            layout = make_layout(
                step.groups(),
                common_attn_metadata.query_start_loc_cpu.numpy(),
                common_attn_metadata.query_start_loc.device,
                pools_first=pools_first,
            )
            composites = common_attn_metadata
            if layout.num_rows:  # not where all exit: then no upper layer runs
                composites = composite_metadata(common_attn_metadata, layout)
            metadata = super().build(common_prefix_len, composites, fast_build)
            metadata.mux_layout = layout
            metadata.mux_slot_mapping = composites.slot_mapping
            return metadata

    return subclass_attention_backend("Composite", underlying, CompositeBuilder)


def enter_upper_layers(layer_names: list[str]) -> MuxLayout | None:
    """Point the upper layers' cache writes at their carriers; return the step's layout.

    None in profiling and warm-up runs, which have no plan: then every row passes through alone.
    """
    context = get_forward_context()
    if not isinstance(context.attn_metadata, dict):
        return None
    by_layer: dict[str, Any] = context.attn_metadata
    layout = getattr(by_layer.get(layer_names[0]), "mux_layout", None)
    if layout is None:
        return None
    assert isinstance(context.slot_mapping, dict)
    for name in layer_names:
        context.slot_mapping[name] = by_layer[name].mux_slot_mapping
    return layout
