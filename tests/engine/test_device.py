"""What a GPU would punish, without a GPU: waiting for the device, padded rows, shared memory."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.forward_context import (
    BatchDescriptor,
    ForwardContext,
    get_forward_context,
    override_forward_context,
)

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.attention import composite_metadata
from revmux_vllm.engine.graphs import UpperGraphs, choose_capture_sizes
from revmux_vllm.engine.layout import make_layout
from revmux_vllm.engine.models.base import Layout, RevMuxForSequenceClassification
from revmux_vllm.engine.prefixes import RowBlocks, on_device
from revmux_vllm.engine.transfer import sent
from revmux_vllm.rungs import Ends, Rung, parse_rungs

D = 32
ENDS = Ends(has_sink=True)
RUNGS = parse_rungs(
    ["mux:2", "mux:4", "merge:2", "merge:2+mux:2", "exit", "mux:2@2", "merge:2@2", "exit@3"]
)
LAYERS = 4
GROUPS = [
    (Rung(), (3,)),
    (Rung(mux=2), (0, 1)),
    (Rung(mux=4), (2, 4, 5, 6)),
    (Rung(merge=2), (7,)),
    (Rung(2, 2), (8, 9)),
    (Rung(exit=True), (10,)),
    (Rung(merge=2, stop=2), (11,)),
    (Rung(stop=3), (12,)),
    (Rung(mux=2, stop=2), (13, 14)),
]
LENGTHS = [5, 3, 9, 4, 7, 2, 1, 6, 7, 4, 3, 4, 2, 3, 2]
STARTS = np.cumsum([0, *LENGTHS])
NUM_TOKENS = int(STARTS[-1])


class Trunk(nn.Module):
    """Works row by row, as everything in a backbone does but attention."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(D, D)

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:
        if rows.dtype == torch.int64:  # token ids
            rows = torch.sin(rows[:, None] * torch.arange(1.0, D + 1, device=rows.device))
        return torch.tanh(self.own(rows) + positions[:, None])


class Model(RevMuxForSequenceClassification):
    """All that lies between and behind the trunks; the trunks have no attention."""

    def __init__(self, max_rows: int = 0, adapter_dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.revmux = RevMuxConfig(RUNGS, prefill_layers=1, adapter_hidden_size=8)
        self.bounds, self.num_layers = [1, 2, 3, LAYERS], LAYERS
        self.lower, self.upper = Trunk(), nn.ModuleList(Trunk() for _ in range(3))
        self.adapters = AdapterLadder(self.revmux, D).to(adapter_dtype)
        for parameter in self.adapters.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.adapter_dtype = adapter_dtype
        self.hidden_size, self.ends = D, ENDS
        self.upper_layer_names = {first: [f"upper.{first}"] for first in self.bounds[:-1]}
        self.upper_graphs = UpperGraphs(max_rows, D)

    def build(self, vllm_config: Any) -> list[list[Any]]:
        raise NotImplementedError

    def weight_names(self) -> Any:
        raise NotImplementedError


def context_of(layout: Layout | None, mode: CUDAGraphMode, size: int) -> ForwardContext:
    """A step's, as vLLM makes it; without a layout one in which all run alone."""
    metadata: dict[str, Any] = {}
    for first in range(1, LAYERS):
        metadata[f"upper.{first}"] = SimpleNamespace()
        if layout is not None:
            slots = torch.zeros(layout.passing(first)[1], dtype=torch.int64)
            metadata[f"upper.{first}"] = SimpleNamespace(
                mux_layout=layout, mux_slot_mapping=slots.to(layout.positions.device)
            )
    return ForwardContext(
        no_compile_layers={},
        attn_metadata=metadata,
        slot_mapping=dict.fromkeys(metadata, torch.zeros(0, dtype=torch.int64)),
        cudagraph_runtime_mode=mode,
        batch_descriptor=BatchDescriptor(size),
    )


def run(model: Model, groups: Any, mode: CUDAGraphMode, size: int = NUM_TOKENS) -> Tensor:
    """A step of ``groups`` (None: all alone), its tokens padded to ``size``."""
    layout = None
    if groups is not None:
        layout = sent(make_layout(groups, STARTS, ENDS), torch.device("cpu"))
    ids = torch.cat([torch.arange(1, NUM_TOKENS + 1), torch.zeros(size - NUM_TOKENS).long()])
    with override_forward_context(context_of(layout, mode, size)), torch.inference_mode():
        return model(ids, torch.arange(size) % 7)[:NUM_TOKENS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [None, 0, 8])
def test_a_step_asks_the_device_for_nothing(dtype: torch.dtype, cached: int | None) -> None:
    """Tensors without values: whatever would wait for one (``item``, a mask) raises here.

    In place of fake CUDA tensors, which a CPU build of torch cannot index.
    """
    meta = torch.device("meta")
    model = Model(adapter_dtype=dtype).to("meta")
    if cached is None:
        layout = sent(make_layout(GROUPS, STARTS, ENDS), meta)
    else:
        model.tail, model.cache_config = 1, SimpleNamespace(num_gpu_blocks=64, block_size=4)
        computed = np.full(len(LENGTHS), cached)
        made = sent(make_layout(GROUPS, STARTS, ENDS, computed, RowBlocks(4, 1)), meta)
        table = torch.zeros(len(LENGTHS), 8, dtype=torch.int32, device=meta)
        layout = replace(made, paging=on_device(made.paging, table))
    ids = torch.zeros(NUM_TOKENS, dtype=torch.int64, device=meta)
    with override_forward_context(context_of(layout, CUDAGraphMode.NONE, NUM_TOKENS)):
        out = model(ids, ids)
    assert out.device == meta
    assert out.shape == (NUM_TOKENS, D)


def test_rewriting_the_metadata_asks_the_device_for_nothing() -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    meta = torch.device("meta")
    layout = sent(make_layout(GROUPS, STARTS, ENDS), meta)
    starts = torch.from_numpy(STARTS).int()
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(meta),
        query_start_loc_cpu=starts,
        seq_lens=starts.diff().to(meta),
        num_reqs=len(LENGTHS),
        num_actual_tokens=NUM_TOKENS,
        max_query_len=max(LENGTHS),
        max_seq_len=max(LENGTHS),
        block_table_tensor=torch.zeros(len(LENGTHS), 4, dtype=torch.int32, device=meta),
        slot_mapping=torch.zeros(NUM_TOKENS, dtype=torch.int64, device=meta),
    )
    composites = composite_metadata(common, layout, 1)
    on_device = (composites.query_start_loc, composites.seq_lens, composites.slot_mapping)
    assert {tensor.device for tensor in on_device} == {meta}
    assert composites.seq_lens.dtype == common.seq_lens.dtype
    assert composites.query_start_loc.dtype == common.query_start_loc.dtype
    assert composites.num_reqs == 8
    assert composites.max_query_len == 9
    behind = composite_metadata(common, layout, 3)
    assert behind.num_reqs == 5
    assert behind.num_actual_tokens == layout.passing(3)[1] < layout.num_rows


class Captured(nn.Module):
    """A trunk as vLLM's graphs run it (compilation/cuda_graph.py): the same memory every time.

    A captured size reads its inputs where they lay when it was captured, whatever it is given, and
    leaves its result in a pool that all graphs share, spoiled by every other.
    """

    def __init__(self, trunk: nn.Module, pool: Tensor) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool
        self.inputs: dict[BatchDescriptor, tuple[Tensor, ...]] = {}
        self.capturing = True

    def forward(self, *inputs: Tensor) -> Tensor:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return self.trunk(*inputs)
        key = context.batch_descriptor
        assert key is not None
        if self.capturing:
            self.inputs[key] = inputs
        out = self.trunk(*self.inputs[key])
        assert len(out) == key.num_tokens
        self.pool.fill_(torch.nan)
        into = self.pool[: out.numel()].view(out.shape)
        return into.copy_(out)


SIZES = (8, 16, 32, 64)


@pytest.fixture
def captured() -> Model:
    """A model whose trunks are captured at ``SIZES``, as vLLM's warm-up does it."""
    model = Model(max_rows=SIZES[-1])
    pool = torch.empty(SIZES[-1] * D)
    model.lower = Captured(model.lower, pool)
    model.upper = nn.ModuleList(Captured(part, pool) for part in model.upper)
    buffers = torch.zeros(SIZES[-1], dtype=torch.int64), torch.zeros(SIZES[-1], dtype=torch.int64)
    for size in reversed(SIZES):
        context = context_of(None, CUDAGraphMode.PIECEWISE, size)
        with override_forward_context(context), torch.inference_mode():
            model(*(buffer[:size] for buffer in buffers))
    for trunk in (model.lower, *model.upper):
        trunk.capturing = False
    assert model.upper_graphs.sizes == list(SIZES)
    # vLLM's runner keeps its inputs where they are; so does this one.
    forward = model.forward

    def with_its_buffers(ids: Tensor, positions: Tensor) -> Tensor:
        for buffer, given in zip(buffers, (ids, positions), strict=True):
            buffer[: len(given)].copy_(given)
        return forward(*(buffer[: len(ids)] for buffer in buffers))

    model.forward = with_its_buffers  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("groups", [None, GROUPS, [(Rung(merge=2), (i,)) for i in range(15)]])
def test_graphs_give_what_eager_gives(captured: Model, groups: Any) -> None:
    captured.upper_graphs.rows.fill_(torch.nan)  # padding may hold anything
    expected = run(Model(), groups, CUDAGraphMode.NONE)
    pooled = STARTS[1:] - 1
    for _ in range(2):
        out = run(captured, groups, CUDAGraphMode.PIECEWISE, size=64)
        torch.testing.assert_close(out[pooled], expected[pooled], rtol=0, atol=1e-6)
    # Below the cut more tokens than any graph was captured for, above it a graph all the same.
    out = run(captured, groups, CUDAGraphMode.NONE)
    torch.testing.assert_close(out[pooled], expected[pooled], rtol=0, atol=1e-6)


def test_the_upper_layers_run_at_the_next_captured_size(captured: Model) -> None:
    seen: list[tuple[CUDAGraphMode, int]] = []

    def upper(rows: Tensor, positions: Tensor) -> Tensor:
        context = get_forward_context()
        seen.append((context.cudagraph_runtime_mode, len(rows)))
        assert context.batch_descriptor is not None
        return rows

    rows, positions = torch.ones(20, D), torch.arange(20)
    context = context_of(None, CUDAGraphMode.NONE, 999)
    with override_forward_context(context):
        captured.upper_graphs.run(upper, rows, positions, own=True)
        captured.upper_graphs.run(upper, torch.ones(65, D), torch.arange(65), own=True)
    assert seen == [(CUDAGraphMode.PIECEWISE, 32), (CUDAGraphMode.NONE, 65)]
    assert context.cudagraph_runtime_mode == CUDAGraphMode.NONE
    assert context.batch_descriptor == BatchDescriptor(999)


@pytest.mark.parametrize(
    ("given", "most", "chosen"),
    [
        ({}, 8192, (1, 2048)),
        ({}, 100, (1, 100)),
        ({"cudagraph_capture_sizes": [4, 64]}, 8192, (4, 64)),
        ({"max_cudagraph_capture_size": 256}, 8192, None),
    ],
)
def test_graphs_reach_as_far_as_composites(
    given: dict[str, Any], most: int, chosen: tuple[int, int] | None
) -> None:
    config = CompilationConfig(**given)
    scheduler = SimpleNamespace(max_num_batched_tokens=most)
    choose_capture_sizes(SimpleNamespace(compilation_config=config, scheduler_config=scheduler))
    sizes = config.cudagraph_capture_sizes
    assert (None if sizes is None else (sizes[0], sizes[-1])) == chosen
    gaps = np.diff(sizes or [0])
    assert given or (gaps <= np.maximum(8, np.array(sizes[1:]) // 8)).all()


def test_the_context_is_put_back_when_the_layers_fail(captured: Model) -> None:
    def upper(rows: Tensor, positions: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    context = context_of(None, CUDAGraphMode.NONE, 999)
    with override_forward_context(context), pytest.raises(RuntimeError):
        captured.upper_graphs.run(upper, torch.ones(20, D), torch.arange(20), own=True)
    assert context.cudagraph_runtime_mode == CUDAGraphMode.NONE


def test_padding_writes_nothing_into_the_cache(captured: Model) -> None:
    """vLLM skips slots of -1; every padded row must have one."""
    layout = sent(make_layout(GROUPS, STARTS, ENDS), torch.device("cpu"))
    context = context_of(layout, CUDAGraphMode.NONE, NUM_TOKENS)
    for first in range(1, LAYERS):
        context.attn_metadata[f"upper.{first}"].mux_slot_mapping += 7  # type: ignore[call-overload]
    with override_forward_context(context), torch.inference_mode():
        captured(torch.zeros(NUM_TOKENS).long(), torch.zeros(NUM_TOKENS).long())
    for first in range(1, LAYERS):
        slots = context.slot_mapping[f"upper.{first}"].tolist()  # type: ignore[call-overload]
        num_rows = layout.passing(first)[1]
        size = next(size for size in SIZES if size >= num_rows)
        assert slots == [7] * num_rows + [-1] * (size - num_rows)
