"""Where every row of a step comes from and goes to: index arithmetic, no vLLM.

The lower layers run on the batch's tokens as vLLM laid them out. The upper layers run on the
*upper rows*: composites sorted by width, each as long as its carrier. ``MuxLayout`` says which
token rows feed which upper row, which upper row each sequence is read at, and how the attention
metadata of the upper layers follows from the batch's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class WidthLayout:
    """Indices of the composites of one width N.

    Attributes:
        width: N.
        rows: (R, N) token row of every member in every upper row; the batch's number of tokens
            where the member has ended, so that one zero row behind the batch can be gathered.
        present: (R, N) bool, False where the member has ended.
        read_at: (M,) upper row at which each member is read, counted over all widths.
        stream: (M,) stream of each member.
        sequence: (M,) row of the batch of each member.
    """

    width: int
    rows: Tensor
    present: Tensor
    read_at: Tensor
    stream: Tensor
    sequence: Tensor


@dataclass(frozen=True)
class MuxLayout:
    """Indices of one step.

    Attributes:
        widths: one entry for each width above 1 that occurs, ascending.
        alone: (A,) token rows of the sequences that run alone; they are the first upper rows.
        positions: (U,) position of every upper row in its composite.
        carriers: (G,) batch row of each composite's carrier, in upper order.
        carrier_rows: (U,) the carrier's token row for every upper row.
        starts: (G + 1,) first upper row of every composite, and U; on the CPU.
        sequence_of_token: (num_tokens,) batch row of every token.
        sequence_lengths: (B,) tokens of every sequence.
        last_token: (B,) token row of every sequence's last token.
    """

    widths: tuple[WidthLayout, ...]
    alone: Tensor
    positions: Tensor
    carriers: Tensor
    carrier_rows: Tensor
    starts: Tensor
    sequence_of_token: Tensor
    sequence_lengths: Tensor
    last_token: Tensor

    @property
    def num_rows(self) -> int:
        """Upper rows U."""
        return len(self.positions)


def make_layout(
    groups: Sequence[Sequence[int]], starts: np.ndarray, device: torch.device | str = "cpu"
) -> MuxLayout:
    """Lay out the composites ``groups``.

    Args:
        groups: batch rows of each composite, carrier (the longest) first; every row of the batch
            in exactly one.
        starts: (B + 1,) first token row of every sequence, and the number of tokens.
        device: where the index tensors go.

    Raises:
        ValueError: if a row of the batch stands in no group or in two, or a carrier is shorter
            than a member.
    """
    lengths = np.diff(starts)
    num_tokens = int(starts[-1])
    ordered = sorted(groups, key=len)
    members = np.fromiter((row for group in ordered for row in group), np.int64)
    if not np.array_equal(np.sort(members), np.arange(len(lengths))):
        raise ValueError(f"groups do not cover the batch's {len(lengths)} rows once: {groups}")
    carriers = np.array([group[0] for group in ordered], np.int64)
    rows_of = lengths[carriers]  # rows of each composite
    upper_starts = np.concatenate([[0], np.cumsum(rows_of)])
    positions = np.arange(upper_starts[-1]) - np.repeat(upper_starts[:-1], rows_of)
    carrier_rows = np.repeat(starts[carriers], rows_of) + positions

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    sizes = np.array([len(group) for group in ordered])
    widths = []
    for width in np.unique(sizes[sizes > 1]):
        index = np.flatnonzero(sizes == width)
        table = np.array([ordered[g] for g in index], np.int64)  # (G, N)
        if (lengths[table] > lengths[table[:, :1]]).any():
            raise ValueError(f"a member is longer than its carrier: {table.tolist()}")
        first, last = upper_starts[index[0]], upper_starts[index[-1] + 1]
        at = np.repeat(table, rows_of[index], axis=0)  # (R, N)
        position = positions[first:last, None]
        present = position < lengths[at]
        rows = np.where(present, starts[at] + position, num_tokens)
        read_at = upper_starts[index][:, None] + lengths[table] - 1  # (G, N)
        stream = np.tile(np.arange(width), len(index))
        widths.append(
            WidthLayout(
                width=int(width),
                rows=tensor(rows),
                present=tensor(present),
                read_at=tensor(read_at.ravel()),
                stream=tensor(stream),
                sequence=tensor(table.ravel()),
            )
        )
    return MuxLayout(
        widths=tuple(widths),
        alone=tensor(carrier_rows[: upper_starts[np.count_nonzero(sizes == 1)]]),
        positions=tensor(positions),
        carriers=tensor(carriers),
        carrier_rows=tensor(carrier_rows),
        starts=torch.from_numpy(upper_starts),
        sequence_of_token=tensor(np.repeat(np.arange(len(lengths)), lengths)),
        sequence_lengths=tensor(lengths),
        last_token=tensor(starts[1:] - 1),
    )
