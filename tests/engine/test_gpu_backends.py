"""The metadata of composites as GPU backends get them, read the way their kernels read them.

vLLM's own builders of FlashAttention and Triton make the metadata, on CPU tensors; a paged
attention in plain PyTorch stands in for the kernels.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from revmux_vllm.engine.attention import composite_attention_backend
from revmux_vllm.engine.layout import make_layout
from revmux_vllm.engine.steps import StepPlan, running
from revmux_vllm.planning.packing import MuxPlan
from revmux_vllm.rungs import Ends, Rung

HEADS, SIZE = 2, 16
GROUPS = [
    (Rung(), (3,)),
    (Rung(mux=2), (0, 1)),
    (Rung(mux=4), (2, 4, 5, 6)),
    (Rung(merge=2), (7,)),
    (Rung(2, 2), (8, 9)),
]
LENGTHS = [35, 33, 70, 4, 69, 2, 1, 46, 37, 36]
STARTS = np.cumsum([0, *LENGTHS])
NUM_TOKENS = int(STARTS[-1])


@pytest.fixture(scope="module")
def vllm_config(tiny_checkpoint: Path) -> Any:
    return EngineArgs(
        str(tiny_checkpoint), runner="pooling", dtype="float32", enforce_eager=True
    ).create_engine_config()


def batch(block_size: int) -> CommonAttentionMetadata:
    """As vLLM's runner makes it: every sequence in pages of its own, in no order."""
    lengths = np.array(LENGTHS)
    num_blocks = -(-lengths // block_size)
    order = torch.randperm(int(num_blocks.sum()), generator=torch.Generator().manual_seed(0)) + 1
    pages = torch.zeros(len(LENGTHS), int(num_blocks.max()), dtype=torch.int32)
    for row, own in enumerate(order.split(num_blocks.tolist())):
        pages[row, : len(own)] = own
    row_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    place = torch.from_numpy(np.arange(NUM_TOKENS) - STARTS[:-1][row_of])
    block = pages[torch.from_numpy(row_of), place // block_size]
    starts = torch.from_numpy(STARTS).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=starts.diff(),
        seq_lens_cpu_upper_bound=starts.diff(),
        num_reqs=len(LENGTHS),
        num_actual_tokens=NUM_TOKENS,
        max_query_len=max(LENGTHS),
        max_seq_len=max(LENGTHS),
        block_table_tensor=pages,
        slot_mapping=block.long() * block_size + place % block_size,
        positions=place,
        is_prefilling=torch.ones(len(LENGTHS), dtype=torch.bool),
    )


def built(backend: type[AttentionBackend], block_size: int, config: Any, groups: Any) -> Any:
    """Metadata by the backend's own builder, under a plan."""
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32
    )
    plan = MuxPlan(
        tuple(tuple(str(row) for row in rows) for _, rows in groups), tuple(r for r, _ in groups)
    )
    rows = {str(row): row for row in range(len(LENGTHS))}
    composite = composite_attention_backend(backend, 1, Ends(has_sink=True), False)
    with set_current_vllm_config(config), running(StepPlan(plan, rows)):
        builder = composite.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
        return builder.build(0, batch(block_size))


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("backend", [FlashAttentionBackend, TritonAttentionBackend])
def test_a_composite_attends_to_itself_and_to_nothing_else(
    backend: type[AttentionBackend], block_size: int, vllm_config: Any
) -> None:
    metadata = built(backend, block_size, vllm_config, GROUPS)
    num_rows = metadata.mux_layout.num_rows
    query, key, value = torch.randn(3, num_rows, HEADS, SIZE)
    # Keys and values are written by the slots, of composites that lie in their carriers' pages.
    cache = torch.full((2, 200 * block_size, HEADS, SIZE), torch.nan)
    assert len(metadata.mux_slot_mapping.unique()) == num_rows
    cache[0, metadata.mux_slot_mapping], cache[1, metadata.mux_slot_mapping] = key, value
    out = paged_attention(query, cache, metadata, block_size)
    starts = make_layout(GROUPS, STARTS, Ends(has_sink=True)).host_starts
    for first, last in itertools.pairwise(starts):
        own = (part[first:last].transpose(0, 1) for part in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True)
        torch.testing.assert_close(out[first:last], expected.transpose(0, 1))


def paged_attention(query: Tensor, cache: Tensor, metadata: Any, block_size: int) -> Tensor:
    """(U, heads, size), from what a kernel reads of the metadata."""
    assert metadata.num_actual_tokens == len(query)
    assert metadata.max_query_len == metadata.max_seq_len == int(metadata.seq_lens.max())
    out = torch.full_like(query, torch.nan)
    starts = metadata.query_start_loc.tolist()
    for i, length in enumerate(metadata.seq_lens.tolist()):
        pages = metadata.block_table[i, : -(-length // block_size)].long()
        slots = (pages[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
        mine = query[starts[i] : starts[i + 1]].transpose(0, 1)
        keys, values = cache[0, slots].transpose(0, 1), cache[1, slots].transpose(0, 1)
        attended = torch.nn.functional.scaled_dot_product_attention(
            mine, keys, values, is_causal=True
        )
        out[starts[i] : starts[i + 1]] = attended.transpose(0, 1)
    return out


@pytest.mark.parametrize("backend", [FlashAttentionBackend, TritonAttentionBackend])
def test_all_alone_takes_vllms_own_metadata(
    backend: type[AttentionBackend], vllm_config: Any
) -> None:
    alone = [(Rung(), (row,)) for row in range(len(LENGTHS))]
    metadata = built(backend, 16, vllm_config, alone)
    assert not hasattr(metadata, "mux_layout")
    common = batch(16)
    assert torch.equal(metadata.query_start_loc, common.query_start_loc)
    assert torch.equal(metadata.block_table, common.block_table_tensor)
    assert torch.equal(metadata.slot_mapping, common.slot_mapping)
