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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from revmux_vllm.engine.layout import MuxLayout, make_layout
from revmux_vllm.engine.prefixes import RowBlocks, on_device
from revmux_vllm.engine.steps import StepPlan, current_step
from revmux_vllm.engine.transfer import sent
from revmux_vllm.rungs import Ends


def composite_metadata(
    common: CommonAttentionMetadata, layout: MuxLayout[Tensor], first_layer: int
) -> CommonAttentionMetadata:
    """``common`` with the composites that reach a layer in place of the batch's sequences.

    Both runners' only way.
    """
    num_groups, num_rows = layout.passing(first_layer)
    starts = torch.from_numpy(layout.host_starts[: num_groups + 1])
    lengths = torch.from_numpy(layout.host_lengths[:num_groups])
    if (paging := layout.paging) is None:
        table = common.block_table_tensor[layout.carriers[:num_groups]]
        slots = common.slot_mapping[layout.carrier_rows[:num_rows]]
    else:
        table, slots = paging.row_table[:num_groups], paging.slots[:num_rows]
    return common.replace(
        query_start_loc=layout.starts[: num_groups + 1],
        query_start_loc_cpu=starts,
        seq_lens=layout.lengths[:num_groups],
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=num_groups,
        num_actual_tokens=num_rows,
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=slots,
        positions=layout.places[:num_rows],
        is_prefilling=torch.ones(num_groups, dtype=torch.bool),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def metadata_for(
    build: Callable[[CommonAttentionMetadata], Any],
    common: CommonAttentionMetadata,
    first_layer: int,
    layout: MuxLayout[Tensor],
) -> Any:
    """A backend's metadata of what ``layout`` has in a layer: all of the step, or what goes on.

    Args:
        build: the backend's own.
        common: of the step.
        first_layer: of those that run on the same rows.
        layout: of all of the step, or of what goes on of it.
    """
    composites = common
    if layout.rungs and layout.passing(first_layer)[0]:  # else these layers do not run
        composites = composite_metadata(common, layout, first_layer)
    metadata = build(composites)
    metadata.mux_slot_mapping = composites.slot_mapping
    return metadata


def layout_of(
    step: StepPlan, common: CommonAttentionMetadata, ends: Ends, blocks: RowBlocks | None
) -> MuxLayout[Tensor]:
    """The layout of a step, on the device.

    Args:
        step: its plan.
        common: vLLM's own metadata of it.
        ends: which tokens of a sequence are not like the others.
        blocks: of the cache; None where it keeps no prefixes.
    """
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy()
    computed = None
    if blocks is not None:
        lengths = common.seq_lens_cpu_upper_bound
        assert lengths is not None
        computed = lengths[: common.num_reqs].numpy() - np.diff(starts)
    made = make_layout(step.groups(), starts, ends, computed, blocks)
    layout: MuxLayout[Tensor] = sent(made, common.query_start_loc.device)
    if layout.paging is None:
        return layout
    return replace(layout, paging=on_device(layout.paging, common.block_table_tensor))


def tell_windows_apart(model: nn.Module) -> None:
    """Give layers that differ in their attention windows metadata of their own, by window.

    A backend may plan a step's work by the window, and vLLM builds metadata once for all layers
    whose backends have one name.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if len({attention.sliding_window for attention in attentions}) > 1:
        for attention in attentions:
            attention.attn_backend = _within(attention.attn_backend, attention.sliding_window)


@functools.lru_cache
def _within(underlying: type[AttentionBackend], window: int | None) -> type[AttentionBackend]:
    """``underlying`` under another name."""
    return subclass_attention_backend(f"Within{window}", underlying, underlying.get_builder_cls())


@functools.lru_cache
def composite_attention_backend(
    underlying: type[AttentionBackend],
    first_layer: int,
    ends: Ends,
    reads_sequences: bool,
    tail: int | None = None,
) -> type[AttentionBackend]:
    """``underlying`` for the upper layers from one on: its metadata carries ``mux_layout``.

    Where all run alone the metadata are vLLM's, untouched.

    Args:
        underlying: vLLM's choice.
        first_layer: of the layers that run on the same rows.
        ends: which tokens of a sequence are not like the others.
        reads_sequences: the model needs the layout also where all run alone.
        tail: see ``RowBlocks``; None where no prefixes are kept.
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
            if step is None or (step.plan.all_alone and not reads_sequences):
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            if step.layout is None:
                blocks = None if tail is None else RowBlocks(self.kv_cache_spec.block_size, tail)
                step.layout = layout_of(step, common_attn_metadata, ends, blocks)
            layout: MuxLayout[Tensor] = step.layout
            own = super().build
            build = functools.partial(
                metadata_for,
                lambda common: own(common_prefix_len, common, fast_build),
                common_attn_metadata,
                first_layer,
            )
            metadata = build(layout)
            metadata.mux_layout, metadata.mux_rebuild = layout, build
            return metadata

    # vLLM tells backends apart by their names.
    return subclass_attention_backend(f"CompositeFrom{first_layer}", underlying, CompositeBuilder)


def enter_upper_layers(
    layer_names: Mapping[int, Sequence[str]], padded_size: Callable[[int], int]
) -> MuxLayout[Tensor] | None:
    """Point the upper layers' cache writes at their carriers; return the step's layout.

    None where every row passes through alone: in profiling and warm-up runs, which have no plan,
    and in steps whose plan says so.

    Args:
        layer_names: of the upper layers' attention, by the first of the layers that run on the same
            rows.
        padded_size: how many rows they will run on, for so many that there are. vLLM has a slot for
            every row, and -1 for padding, which no backend writes.
    """
    context = get_forward_context()
    if not isinstance(context.attn_metadata, dict):
        return None
    by_layer: dict[str, Any] = context.attn_metadata
    layout: MuxLayout[Tensor] | None
    layout = getattr(by_layer.get(next(iter(layer_names.values()))[0]), "mux_layout", None)
    if layout is None or not layout.rungs:
        return layout
    for first_layer, names in layer_names.items():
        _, num_rows = layout.passing(first_layer)
        if not num_rows:
            break
        _set_slots(context, names, padded_size(num_rows) - num_rows)
    return layout


def enter_with_fewer(
    names: Sequence[str], layout: MuxLayout[Tensor], padded_size: Callable[[int], int]
) -> None:
    """Metadata and slots of a part of the upper layers anew, for the sequences that go on.

    Args:
        names: of the part's attention; none where a family has no use for metadata.
        layout: of what goes on.
        padded_size: as for ``enter_upper_layers``.
    """
    if not names:
        return
    context = get_forward_context()
    assert isinstance(context.attn_metadata, dict)
    by_layer: dict[str, Any] = context.attn_metadata
    rebuilt: dict[int, Any] = {}  # layers of one window share their metadata
    for name in names:
        before = by_layer[name]
        if id(before) not in rebuilt:
            rebuilt[id(before)] = before.mux_rebuild(layout)
        by_layer[name] = rebuilt[id(before)]
    _set_slots(context, names, padded_size(layout.num_rows) - layout.num_rows)


def _set_slots(context: ForwardContext, names: Sequence[str], padding: int) -> None:
    """Layers of one part write where their metadata say; ``padding`` rows write nowhere."""
    assert isinstance(context.slot_mapping, dict)
    assert isinstance(context.attn_metadata, dict)
    by_layer: dict[str, Any] = context.attn_metadata
    padded: dict[int, Tensor] = {}  # layers of one window share their slots
    for name in names:
        slots = by_layer[name].mux_slot_mapping
        if id(slots) not in padded:
            padded[id(slots)] = nn.functional.pad(slots, (0, padding), value=PAD_SLOT_ID)
        context.slot_mapping[name] = padded[id(slots)]
