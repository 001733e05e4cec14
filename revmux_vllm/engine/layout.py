"""Where every row of a step comes from and goes to: index arithmetic, no vLLM.

The lower layers run on the batch's tokens as vLLM laid them out. The upper layers run on the
*upper rows*: composites sorted by rung, each as long as its carrier, which is shorter than the
carrier's tokens where tokens merge. ``MuxLayout`` says which token rows feed which upper row, which
upper row each sequence is read at, and how the attention metadata of the upper layers follows from
the batch's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revmux_vllm.adapters.merging import merged_tokens
from revmux_vllm.rungs import Rung, row_counts

ToTensor = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class RungLayout:
    """Indices of the composites of one rung, of N members each.

    A rung without upper rows (``exit``) has members, and no row.

    Attributes:
        rung: which.
        tokens: (P, rung.shortening) token rows of the P merged rows of all members, one after the
            other; the batch's number of tokens where there is none, so that one zero row behind the
            batch can be gathered. None where nothing merges: then P are the batch's tokens.
        merged: (P, rung.shortening) bool, False where there is none.
        rows: (R, N) which of the P rows of every member feeds every upper row; P where the member
            has ended.
        present: (R, N) bool, False where the member has ended.
        read_at: (M,) upper row at which each member is read, counted over all rungs; None where
            there is none.
        stream: (M,) stream of each member.
        sequence: (M,) row of the batch of each member.
    """

    rung: Rung
    tokens: Tensor | None
    merged: Tensor | None
    rows: Tensor
    present: Tensor
    read_at: Tensor | None
    stream: Tensor
    sequence: Tensor


@dataclass(frozen=True)
class MuxLayout:
    """Indices of one step.

    Attributes:
        rungs: one entry for each that occurs, but for sequences alone.
        alone: (A,) token rows of the sequences that run alone; they are the first upper rows.
        positions: (U,) position of every upper row in its sequence, for rotary embeddings; of a
            merged row that of its last token.
        places: (U,) of every upper row in its composite, for the attention's metadata.
        carriers: (G,) batch row of each composite's carrier, in upper order.
        carrier_rows: (U,) the carrier's token row whose place in the cache every upper row takes.
        starts: (G + 1,) first upper row of every composite, and U; on the CPU.
        sequence_of_token: (num_tokens,) batch row of every token.
        sequence_lengths: (B,) tokens of every sequence.
        pooled_token: (B,) token row that speaks for every sequence.
    """

    rungs: tuple[RungLayout, ...]
    alone: Tensor
    positions: Tensor
    places: Tensor
    carriers: Tensor
    carrier_rows: Tensor
    starts: Tensor
    sequence_of_token: Tensor
    sequence_lengths: Tensor
    pooled_token: Tensor

    @property
    def num_rows(self) -> int:
        """Upper rows U."""
        return len(self.positions)


# Long because the indices of a step hang together: each is made from the ones before it.
def make_layout(
    groups: Sequence[tuple[Rung, Sequence[int]]],
    starts: np.ndarray,
    device: torch.device | str = "cpu",
    pools_first: bool = False,
) -> MuxLayout:
    """Lay out the composites ``groups``.

    Args:
        groups: rung and batch rows of each composite, carrier (the longest) first; every row of the
            batch in exactly one.
        starts: (B + 1,) first token row of every sequence, and the number of tokens.
        device: where the index tensors go.
        pools_first: the pooled token is a sequence's first one; else it is the last.

    Raises:
        ValueError: if a row of the batch stands in no group or in two, or a carrier is shorter
            than a member.
    """
    starts = starts.astype(np.int64)
    lengths = np.diff(starts)
    if sorted(row for _, group in groups for row in group) != list(range(len(lengths))):
        raise ValueError(f"groups do not cover the batch's {len(lengths)} rows once: {groups}")
    exits = np.array([row for rung, group in groups if rung.exit for row in group], np.int64)
    ordered = sorted((g for g in groups if not g[0].exit), key=lambda group: group[0])
    tables = [np.array(group, np.int64) for _, group in ordered]
    carriers = np.array([table[0] for table in tables], np.int64)
    shortening = np.array([rung.shortening for rung, _ in ordered], np.int64)
    rows_of = row_counts(lengths[carriers], shortening)
    upper_starts = np.concatenate([[0], np.cumsum(rows_of)])
    place = np.arange(upper_starts[-1]) - np.repeat(upper_starts[:-1], rows_of)
    positions = place.copy()

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    parts, num_alone = [_exits(exits, tensor)] if len(exits) else [], 0
    for rung in sorted({rung for rung, _ in ordered}):
        index = [g for g, (at, _) in enumerate(ordered) if at == rung]
        first, last = upper_starts[index[0]], upper_starts[index[-1] + 1]
        if rung == Rung():
            num_alone = last
            continue
        table = np.stack([tables[g] for g in index])  # (G, N)
        if (lengths[table] > lengths[table[:, :1]]).any():
            raise ValueError(f"a member is longer than its carrier: {table.tolist()}")
        source = _tokens(table, starts)
        if rung.shortening > 1:
            factor = rung.shortening
            source, positions[first:last] = _merged(factor, table, starts, pools_first)
        at = np.repeat(np.arange(len(table)), rows_of[index])  # (R,) composite
        pooled = source.num_rows * 0 if pools_first else source.num_rows - 1
        read_at = upper_starts[index][:, None] + pooled
        parts.append(_rung_layout(rung, table, source, at, place[first:last], read_at, tensor))
    carrier_rows = np.repeat(starts[carriers], rows_of) + place
    return MuxLayout(
        rungs=tuple(parts),
        alone=tensor(carrier_rows[:num_alone]),
        positions=tensor(positions),
        places=tensor(place),
        carriers=tensor(carriers),
        carrier_rows=tensor(carrier_rows),
        starts=torch.from_numpy(upper_starts),
        sequence_of_token=tensor(np.repeat(np.arange(len(lengths)), lengths)),
        sequence_lengths=tensor(lengths),
        pooled_token=tensor(starts[:-1] if pools_first else starts[1:] - 1),
    )


def _rung_layout(
    rung: Rung,
    table: np.ndarray,
    source: "_Source",
    at: np.ndarray,
    place: np.ndarray,
    read_at: np.ndarray,
    tensor: ToTensor,
) -> RungLayout:
    """Of a rung with upper rows.

    Args:
        table: (G, N) batch rows of the members.
        source: the rows that they are made from.
        at: (R,) which of the G composites every upper row is of.
        place: (R,) of every upper row in it.
        read_at: (G, N) upper row at which each member is read.
    """
    present = place[:, None] < source.num_rows[at]
    return RungLayout(
        rung=rung,
        tokens=None if source.tokens is None else tensor(source.tokens),
        merged=None if source.merged is None else tensor(source.merged),
        rows=tensor(np.where(present, source.starts[at] + place[:, None], source.absent)),
        present=tensor(present),
        read_at=tensor(read_at.ravel()),
        stream=tensor(np.tile(np.arange(rung.mux), len(table))),
        sequence=tensor(table.ravel()),
    )


def _exits(sequences: np.ndarray, tensor: ToTensor) -> RungLayout:
    """Of members that have no upper row."""
    return RungLayout(
        rung=Rung(exit=True),
        tokens=None,
        merged=None,
        rows=tensor(np.zeros((0, 1), np.int64)),
        present=tensor(np.zeros((0, 1), bool)),
        read_at=None,
        stream=tensor(np.zeros_like(sequences)),
        sequence=tensor(sequences),
    )


@dataclass(frozen=True)
class _Source:
    """The P rows that a rung's upper rows are made from.

    Attributes:
        tokens, merged: as in ``RungLayout``.
        starts: (G, N) first of them of every member.
        num_rows: (G, N) of every member.
        absent: the zero row behind them.
    """

    tokens: np.ndarray | None
    merged: np.ndarray | None
    starts: np.ndarray
    num_rows: np.ndarray
    absent: int


def _tokens(table: np.ndarray, starts: np.ndarray) -> _Source:
    """The batch's own tokens."""
    return _Source(None, None, starts[table], np.diff(starts)[table], int(starts[-1]))


def _merged(
    factor: int, table: np.ndarray, starts: np.ndarray, pools_first: bool
) -> tuple[_Source, np.ndarray]:
    """Merged tokens of all members, and the positions (R,) of the carriers' rows."""
    num_tokens, flat = starts[-1], torch.from_numpy(np.diff(starts)[table].ravel())
    own, counts = (t.numpy() for t in merged_tokens(flat, factor, pools_first))  # (G*N, R', M)
    inside = np.arange(own.shape[1]) < counts[:, None]
    merged = own[inside] >= 0  # (P, M)
    tokens = np.where(merged, (own + starts[table].reshape(-1, 1, 1))[inside], num_tokens)
    first_rows = (np.cumsum(counts) - counts).reshape(table.shape)
    num_rows = counts.reshape(table.shape)
    carriers = own.max(-1).reshape(*table.shape, -1)[:, 0]  # (G, R')
    positions = carriers[inside.reshape(*table.shape, -1)[:, 0]]
    return _Source(tokens, merged, first_rows, num_rows, len(tokens)), positions
