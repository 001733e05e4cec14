"""Where every row of a step comes from and goes to: index arithmetic, no vLLM.

The lower layers run on the batch's tokens as vLLM laid them out. The upper layers run on the
*upper rows*: composites sorted by rung, each as long as its carrier, which is shorter than the
carrier's tokens where tokens merge. ``MuxLayout`` says which token rows feed which upper row, which
upper row each sequence is read at, and how the attention metadata of the upper layers follows from
the batch's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revmux_vllm.merging import merged_tokens, row_counts
from revmux_vllm.rungs import Rung


@dataclass(frozen=True)
class RungLayout:
    """Indices of the composites of one rung, of N members each.

    Attributes:
        rung: which.
        tokens: (P, rung.merge) token rows of the P merged rows of all members, one member after the
            other; the batch's number of tokens where there is none, so that one zero row behind the
            batch can be gathered. None where nothing merges: then P are the batch's tokens.
        merged: (P, rung.merge) bool, False where there is none.
        rows: (R, N) which of the P rows of every member feeds every upper row; P where the member
            has ended.
        present: (R, N) bool, False where the member has ended.
        read_at: (M,) upper row at which each member is read, counted over all rungs.
        stream: (M,) stream of each member.
        sequence: (M,) row of the batch of each member.
    """

    rung: Rung
    tokens: Tensor | None
    merged: Tensor | None
    rows: Tensor
    present: Tensor
    read_at: Tensor
    stream: Tensor
    sequence: Tensor


@dataclass(frozen=True)
class MuxLayout:
    """Indices of one step.

    Attributes:
        rungs: one entry for each that occurs, but for sequences alone and those that exit.
        exits: (E,) batch rows of the sequences that have no upper row.
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
    exits: Tensor
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
    num_tokens = int(starts[-1])
    exits = np.array([row for rung, group in groups if rung.exit for row in group], np.int64)
    ordered = sorted((g for g in groups if not g[0].exit), key=lambda group: group[0])
    tables = [np.array(group, np.int64) for _, group in ordered]
    members = np.concatenate([exits, *tables])
    if not np.array_equal(np.sort(members), np.arange(len(lengths))):
        raise ValueError(f"groups do not cover the batch's {len(lengths)} rows once: {groups}")
    carriers = np.array([table[0] for table in tables], np.int64)
    merge = np.array([rung.merge for rung, _ in ordered], np.int64)
    rows_of = row_counts(lengths[carriers], merge)
    upper_starts = np.concatenate([[0], np.cumsum(rows_of)])
    place = np.arange(upper_starts[-1]) - np.repeat(upper_starts[:-1], rows_of)
    positions = place.copy()

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    rungs, num_alone = [], 0
    for rung in sorted({rung for rung, _ in ordered}):
        index = [g for g, (at, _) in enumerate(ordered) if at == rung]
        first, last = upper_starts[index[0]], upper_starts[index[-1] + 1]
        if rung == Rung():
            num_alone = last
            continue
        table = np.stack([tables[g] for g in index])  # (G, N)
        if (lengths[table] > lengths[table[:, :1]]).any():
            raise ValueError(f"a member is longer than its carrier: {table.tolist()}")
        tokens = merged = None
        row_starts, num_rows, absent = starts[table], lengths[table], num_tokens  # (G, N)
        if rung.merge > 1:
            flat = torch.from_numpy(lengths[table].ravel())
            own, counts = merged_tokens(flat, rung.merge, pools_first)  # (G*N, R', M)
            num_rows = counts.numpy().reshape(table.shape)
            inside = (torch.arange(own.shape[1]) < counts[:, None]).numpy()
            own_tokens = own.numpy()
            merged = own_tokens[inside] >= 0  # (P, M)
            tokens = np.where(
                merged, (own_tokens + starts[table].reshape(-1, 1, 1))[inside], num_tokens
            )
            absent = len(tokens)
            row_starts = (np.cumsum(counts.numpy()) - counts.numpy()).reshape(table.shape)
            carrier = own_tokens.max(-1).reshape(*table.shape, -1)[:, 0]  # (G, R')
            inside = inside.reshape(*table.shape, -1)[:, 0]
            positions[first:last] = carrier[inside]
        at = np.repeat(np.arange(len(table)), rows_of[index])  # (R,) composite
        own_place = place[first:last, None]
        present = own_place < num_rows[at]
        read_at = upper_starts[index][:, None] + (num_rows * 0 if pools_first else num_rows - 1)
        rungs.append(
            RungLayout(
                rung=rung,
                tokens=None if tokens is None else tensor(tokens),
                merged=None if merged is None else tensor(merged),
                rows=tensor(np.where(present, row_starts[at] + own_place, absent)),
                present=tensor(present),
                read_at=tensor(read_at.ravel()),
                stream=tensor(np.tile(np.arange(rung.mux), len(index))),
                sequence=tensor(table.ravel()),
            )
        )
    carrier_rows = np.repeat(starts[carriers], rows_of) + place
    return MuxLayout(
        rungs=tuple(rungs),
        exits=tensor(exits),
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
