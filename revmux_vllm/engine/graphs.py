"""CUDA graphs of the upper layers, which run on fewer rows than the step has tokens.

vLLM captures a model piece by piece (compilation/cuda_graph.py) for some numbers of tokens, and a
forward pass chooses among them by what its context says. The upper layers have a number of rows of
their own, so for them the context says something else: their rows are padded to the next captured
size, in buffers that never move, because a captured graph reads the same addresses for ever.

Both trunks are captured by vLLM's own warm-up, which passes every size through both. Rows of
padding hold whatever was there before: attention does not see them, all else is row by row, and
nobody reads them.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, ForwardContext, get_forward_context

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LARGEST_SIZE = 2048
"""Rows of the largest graph. A step of prompts has thousands of tokens, and its composites a part
of them; beyond this the layers are longer at work than the host at launching them."""


def choose_capture_sizes(vllm_config: "VllmConfig") -> None:
    """Have graphs captured at more sizes than vLLM's own, which end at 512; the user's stay.

    vLLM makes its choice later (config/vllm.py, ``_set_cudagraph_sizes``).
    """
    config = vllm_config.compilation_config
    if config.cudagraph_capture_sizes is None and config.max_cudagraph_capture_size is None:
        most = min(vllm_config.scheduler_config.max_num_batched_tokens, LARGEST_SIZE)
        sizes = {1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, most, 64), most}
        config.cudagraph_capture_sizes = sorted(size for size in sizes if size <= most)


class UpperGraphs:
    """Runs the upper layers by captured graphs wherever there is one.

    Args:
        max_rows: largest size that may be captured; 0 where no graphs are.
        hidden_size: D.

    Attributes:
        sizes: captured ones, ascending.
    """

    def __init__(self, max_rows: int, hidden_size: int) -> None:
        self.sizes: list[int] = []
        self.rows = torch.zeros(max_rows, hidden_size)
        self.positions = torch.zeros(max_rows, dtype=torch.int64)

    def run(
        self, upper: Callable[[Tensor, Tensor], Tensor], rows: Tensor, positions: Tensor, own: bool
    ) -> Tensor:
        """``upper`` on ``rows`` (U, D) and ``positions`` (U,), to (U, D).

        Args:
            upper: the layers.
            rows, positions: what they run on.
            own: the rows are not the batch's tokens, so that what the context says is not of them.
                Else their number is the one that vLLM chose.
        """
        context = get_forward_context()
        if not own:
            if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
                return upper(rows, positions)
            self._captured(len(rows))
            return self._padded(upper, rows, positions, len(rows))
        size = self.padded_size(len(rows))
        if size not in self.sizes:
            with _told(context, CUDAGraphMode.NONE, context.batch_descriptor):
                return upper(rows, positions)
        with _told(context, CUDAGraphMode.PIECEWISE, BatchDescriptor(size)):
            return self._padded(upper, rows, positions, size)

    def padded_size(self, num_rows: int) -> int:
        """Rows that so many are padded to: the next captured size, or none more than there are."""
        at = bisect_left(self.sizes, num_rows)
        return self.sizes[at] if at < len(self.sizes) else num_rows

    def _captured(self, size: int) -> None:
        """This size is captured, now or before: vLLM sends no other in this mode."""
        if size not in self.sizes:
            insort(self.sizes, size)

    def _padded(
        self,
        upper: Callable[[Tensor, Tensor], Tensor],
        rows: Tensor,
        positions: Tensor,
        size: int,
    ) -> Tensor:
        num_rows = len(rows)
        self.rows[:num_rows].copy_(rows)
        self.positions[:num_rows].copy_(positions)
        return upper(self.rows[:size], self.positions[:size])[:num_rows]


@contextmanager
def _told(
    context: ForwardContext, mode: CUDAGraphMode, descriptor: BatchDescriptor | None
) -> Iterator[None]:
    """The context says this inside the block, and what it said before behind it."""
    before = context.cudagraph_runtime_mode, context.batch_descriptor
    context.cudagraph_runtime_mode, context.batch_descriptor = mode, descriptor
    try:
        yield
    finally:
        context.cudagraph_runtime_mode, context.batch_descriptor = before
