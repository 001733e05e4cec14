"""Where every row of a step comes from and goes to: index arithmetic, no vLLM.

The lower layers run on the batch's tokens as vLLM laid them out. The upper layers run on the
*upper rows*: composites sorted by where they stop, the last ones first, and by rung, each as long
as its carrier, which is shorter than the carrier's tokens where tokens merge. So behind a stop the
rows that go on are the first ones, and nothing moves. ``MuxLayout`` says which token rows feed
which upper row, which upper row each sequence is read at, and how the attention metadata of the
upper layers follows from the batch's.

A sequence may begin behind a prefix that is in the cache: then its tokens and upper rows are those
that are left, and ``prefixes.py`` says where the others are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from revmux_vllm.adapters.merging import merged_tokens
from revmux_vllm.engine.prefixes import Paging, RowBlocks, page
from revmux_vllm.rungs import Ends, Rung, row_counts

A = TypeVar("A", np.ndarray, Tensor)
"""Indices are arrays where they are made, and tensors of the device where they are used."""


@dataclass(frozen=True)
class RungLayout(Generic[A]):
    """Indices of the composites of one rung, of N members each.

    A rung without upper rows (``exit``) has members, and no row.

    Where something is absent, its index is that of the member's own first row, and a mask says so:
    a row behind the batch may be padding, with anything in it.

    Attributes:
        rung: which.
        tokens: (P, rung.shortening) token rows of the P merged rows of all members, one after the
            other. None where nothing merges: then P are the batch's tokens.
        merged: (P, rung.shortening) bool, False where a token is absent.
        rows: (R, N) which of the P rows of every member feeds every upper row.
        present: (R, N) bool, False where the member has ended.
        read_at: (M,) upper row at which each member is read, counted over all rungs; None where
            there is none.
        sinks: (R,) bool, upper rows that are attention sinks; None where no row is mixed, or none
            is one.
        stream: (M,) stream of each member.
        sequence: (M,) row of the batch of each member.
        pooled_token: (M,) token row that speaks for each member.
        first_group: which of all composites is the first of this rung.
    """

    rung: Rung
    tokens: A | None
    merged: A | None
    rows: A
    present: A
    read_at: A | None
    sinks: A | None
    stream: A
    sequence: A
    pooled_token: A
    first_group: int = 0


@dataclass(frozen=True)
class MuxLayout(Generic[A]):
    """Indices of one step.

    Attributes:
        rungs: one entry for each that occurs, but for sequences alone.
        alone: (A,) token rows of the sequences that run alone; they are the first upper rows.
        positions: (U,) position of every upper row in its sequence, for rotary embeddings; of a
            merged row that of its last token.
        places: (U,) of every upper row in its composite, for the attention's metadata; rows in the
            cache come before.
        carriers: (G,) batch row of each composite's carrier, in upper order.
        carrier_rows: (U,) the carrier's token row whose place in the cache every upper row takes.
        starts: (G + 1,) int32, first upper row of every composite, and U.
        lengths: (G,) int32, rows of every composite, those in the cache too.
        sequence_of_token: (num_tokens,) batch row of every token.
        sequence_starts: (B,) first token row of every sequence.
        pooled_token: (B,) token row that speaks for every sequence.
        paging: where prefixes are in the cache; None where none are kept.
        host_starts, host_lengths: ``starts`` and ``lengths`` as arrays.
        host_stops: (G,) layer after which every composite is read, the highest first; infinite for
            the end.
        host_sequence_lengths: (B,) tokens of every sequence, as an array.
    """

    rungs: tuple[RungLayout[A], ...]
    alone: A
    positions: A
    places: A
    carriers: A
    carrier_rows: A
    starts: A
    lengths: A
    sequence_of_token: A
    sequence_starts: A
    pooled_token: A
    paging: Paging[A] | None
    host_starts: np.ndarray = field(metadata={"host": True})
    host_lengths: np.ndarray = field(metadata={"host": True})
    host_stops: np.ndarray = field(metadata={"host": True})
    host_sequence_lengths: np.ndarray = field(metadata={"host": True})

    @property
    def num_rows(self) -> int:
        """Upper rows U."""
        return len(self.positions)

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return len(self.sequence_of_token)

    def state(
        self: "MuxLayout[Tensor]",
        rows: Tensor,
        read_at: Tensor,
        first_group: int,
        dtype: torch.dtype,
        before: Tensor | None = None,
    ) -> Tensor:
        """What rows know of sequences that share none: (M, 2, D), see ``pooled_and_mean``.

        Args:
            rows: upper rows (U, D), as many as there are at some stop.
            read_at: (M,) the one that speaks for each.
            first_group: of M composites, one after the other.
            dtype: of the result.
            before: (M, D) sums over their rows in the cache.
        """
        last_group = first_group + len(read_at)
        first, last = self.host_starts[first_group], self.host_starts[last_group]
        starts = self.starts[first_group:last_group] - first
        counts = self.lengths[first_group:last_group]
        cached = None if before is None else (before, counts)
        return pooled_and_mean(rows[first:last], read_at - first, starts, dtype, cached)

    def passing(self, layer: int) -> tuple[int, int]:
        """Composites, and their rows, that go on behind so many layers: the first ones."""
        groups = int((self.host_stops > layer).sum())
        return groups, int(self.host_starts[groups])


def pooled_and_mean(
    rows: Tensor,
    read_at: Tensor,
    starts: Tensor,
    dtype: torch.dtype,
    cached: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Of every sequence the row that speaks for it and the mean over its rows: (M, 2, D).

    The mean is of float32 as the reference's is; in half precision the order would show. A bag is
    summed in order, where atomic adds would give another sum every time.

    Args:
        rows: (U, D), of one sequence after the other.
        read_at: (M,).
        starts: (M,) first row of every sequence.
        dtype: of the result.
        cached: sums (M, D) over rows of theirs that are in the cache, and how many (M,) there are
            with them.
    """
    mode = "mean" if cached is None else "sum"
    every = torch.arange(len(rows), dtype=starts.dtype, device=rows.device)
    mean = torch.nn.functional.embedding_bag(every, rows.float(), starts, mode=mode)
    if cached is not None:
        before, counts = cached
        mean = (mean + before) / counts[:, None]
    return torch.stack([rows[read_at].to(dtype), mean.to(dtype)], dim=1)


# Long because the indices of a step hang together: each is made from the ones before it.
def make_layout(
    groups: Sequence[tuple[Rung, Sequence[int]]],
    starts: np.ndarray,
    ends: Ends,
    computed: np.ndarray | None = None,
    blocks: RowBlocks | None = None,
) -> MuxLayout[np.ndarray]:
    """Lay out the composites ``groups``.

    Args:
        groups: rung and batch rows of each composite, carrier (the longest) first; every row of the
            batch in exactly one.
        starts: (B + 1,) first token row of every sequence, and the number of tokens.
        ends: which tokens of a sequence are not like the others.
        computed: (B,) tokens of every sequence that come before and are in the cache, whole blocks
            of every rung that it runs at; default: none.
        blocks: of the cache; None where it keeps no prefixes.

    Raises:
        ValueError: if a row of the batch stands in no group or in two, a carrier is shorter than a
            member, or members of one composite have not the same prefix in the cache.
    """
    starts = starts.astype(np.int64)
    cached = np.zeros(len(starts) - 1, np.int64) if computed is None else computed.astype(np.int64)
    lengths = np.diff(starts) + cached
    if sorted(row for _, group in groups for row in group) != list(range(len(lengths))):
        raise ValueError(f"groups do not cover the batch's {len(lengths)} rows once: {groups}")
    exits = np.array([row for rung, group in groups if rung.exit for row in group], np.int64)
    ordered = sorted((g for g in groups if not g[0].exit), key=lambda group: _upper_order(group[0]))
    tables = [np.array(group, np.int64) for _, group in ordered]
    carriers = np.array([table[0] for table in tables], np.int64)
    shortening = np.array([rung.shortening for rung, _ in ordered], np.int64)
    earlier = _whole_rows(cached[carriers], shortening, ends)  # (G,) in the cache
    all_rows = row_counts(lengths[carriers], shortening, ends)
    rows_of = all_rows - earlier
    upper_starts = np.concatenate([[0], np.cumsum(rows_of)])
    fresh = np.arange(upper_starts[-1]) - np.repeat(upper_starts[:-1], rows_of)
    place = fresh + np.repeat(earlier, rows_of)
    positions = place.copy()
    speaks = starts[:-1] if ends.pools_first else starts[1:] - 1

    parts, num_alone = [_exits(exits, speaks)] if len(exits) else [], 0
    for rung in sorted({rung for rung, _ in ordered}, key=_upper_order):
        index = [g for g, (at, _) in enumerate(ordered) if at == rung]
        first, last = upper_starts[index[0]], upper_starts[index[-1] + 1]
        if rung == Rung():
            num_alone = last
            continue
        table = np.stack([tables[g] for g in index])  # (G, N)
        if (lengths[table] > lengths[table[:, :1]]).any():
            raise ValueError(f"a member is longer than its carrier: {table.tolist()}")
        if (cached[table] != cached[table[:, :1]]).any():
            raise ValueError(f"members with other prefixes in the cache: {table.tolist()}")
        before = earlier[index]
        source = _Source(None, None, starts[table], lengths[table], before)
        if rung.shortening > 1:
            kept = 0 if blocks is None else blocks.tail
            source, positions[first:last] = _merged(
                rung.shortening, table, starts, cached, before, ends, kept
            )
        at = np.repeat(np.arange(len(table)), rows_of[index])  # (R,) composite
        last_rows = source.num_rows - 1 - before[:, None]
        pooled = source.num_rows * 0 if ends.pools_first else last_rows
        read_at = upper_starts[index][:, None] + pooled
        sinks = None
        if ends.has_sink and rung.mux > 1:  # a member that is read there has no other row
            sinks = (place[first:last] == 0) & (source.num_rows.min(1) > 1)[at]
        part = _rung_layout(rung, table, source, at, place[first:last], read_at, sinks, speaks)
        parts.append(replace(part, first_group=index[0]))
    carrier_rows = np.repeat(starts[carriers], rows_of) + fresh
    host_starts = upper_starts.astype(np.int32)
    paging = None
    if blocks is not None:
        composites = carriers, shortening, earlier, upper_starts, -(-lengths // blocks.size)
        paging = page(blocks, starts, cached, *composites)
    return MuxLayout(
        rungs=tuple(parts),
        alone=carrier_rows[:num_alone],
        positions=positions,
        places=place,
        carriers=carriers,
        carrier_rows=carrier_rows,
        starts=host_starts,
        lengths=all_rows.astype(np.int32),
        sequence_of_token=np.repeat(np.arange(len(lengths)), np.diff(starts)),
        sequence_starts=starts[:-1],
        pooled_token=speaks,
        paging=paging,
        host_starts=host_starts,
        host_lengths=all_rows.astype(np.int32),
        host_stops=np.array([_depth(rung) for rung, _ in ordered]),
        host_sequence_lengths=lengths,
    )


def _whole_rows(tokens: np.ndarray, factor: np.ndarray, ends: Ends) -> np.ndarray:
    """Rows of which all tokens are among so many first ones, which are followed by others."""
    kept, _ = ends.kept
    return np.where(tokens > 0, kept + (tokens - kept) // factor, 0)


def _depth(rung: Rung) -> float:
    return rung.stop or np.inf


def _upper_order(rung: Rung) -> tuple[float, Rung]:
    return -_depth(rung), rung


def _rung_layout(
    rung: Rung,
    table: np.ndarray,
    source: "_Source",
    at: np.ndarray,
    place: np.ndarray,
    read_at: np.ndarray,
    sinks: np.ndarray | None,
    speaks: np.ndarray,
) -> RungLayout[np.ndarray]:
    """Of a rung with upper rows.

    Args:
        table: (G, N) batch rows of the members.
        source: the rows that they are made from.
        at: (R,) which of the G composites every upper row is of.
        place: (R,) of every upper row in it.
        read_at: (G, N) upper row at which each member is read.
        sinks: as in ``RungLayout``.
        speaks: (B,) token row that speaks for every sequence.
    """
    present = place[:, None] < source.num_rows[at]
    fresh = (place - source.earlier[at])[:, None]
    return RungLayout(
        rung=rung,
        tokens=source.tokens,
        merged=source.merged,
        rows=source.starts[at] + np.where(present, fresh, 0),
        present=present,
        read_at=read_at.ravel(),
        sinks=sinks,
        stream=np.tile(np.arange(rung.mux), len(table)),
        sequence=table.ravel(),
        pooled_token=speaks[table.ravel()],
    )


def _exits(sequences: np.ndarray, speaks: np.ndarray) -> RungLayout[np.ndarray]:
    """Of members that have no upper row."""
    return RungLayout(
        rung=Rung(exit=True),
        tokens=None,
        merged=None,
        rows=np.zeros((0, 1), np.int64),
        present=np.zeros((0, 1), bool),
        read_at=None,
        sinks=None,
        stream=np.zeros_like(sequences),
        sequence=sequences,
        pooled_token=speaks[sequences],
    )


@dataclass(frozen=True)
class _Source:
    """The P rows that a rung's upper rows are made from.

    Attributes:
        tokens, merged: as in ``RungLayout``.
        starts: (G, N) first of them of every member.
        num_rows: (G, N) of every member, those in the cache too.
        earlier: (G,) rows in the cache.
    """

    tokens: np.ndarray | None
    merged: np.ndarray | None
    starts: np.ndarray
    num_rows: np.ndarray
    earlier: np.ndarray


def _merged(
    factor: int,
    table: np.ndarray,
    starts: np.ndarray,
    cached: np.ndarray,
    earlier: np.ndarray,
    ends: Ends,
    kept: int,
) -> tuple[_Source, np.ndarray]:
    """Merged tokens of all members, and the positions (R,) of the carriers' rows.

    A row may begin in the cache. The last ``kept`` token rows of every sequence's prefix stand
    behind the batch's.
    """
    before = cached[table].ravel()
    flat = torch.from_numpy((np.diff(starts) + cached)[table].ravel())
    own, counts = (t.numpy() for t in merged_tokens(flat, factor, ends))  # (G*N, R', M)
    skipped = np.repeat(earlier, table.shape[1])
    row = np.arange(own.shape[1])
    inside = (row >= skipped[:, None]) & (row < counts[:, None])
    merged = own[inside] >= 0  # (P, M)
    fresh = own - before[:, None, None]  # below zero for what is in the cache
    here = starts[table].reshape(-1, 1, 1) + fresh
    there = starts[-1] + (table.reshape(-1, 1, 1) + 1) * kept + fresh
    nothing = starts[table].reshape(-1, 1, 1)
    tokens = np.where(own < 0, nothing, np.where(fresh >= 0, here, there))[inside]  # (P, M)
    left = counts - skipped
    first_rows = (np.cumsum(left) - left).reshape(table.shape)
    num_rows = counts.reshape(table.shape)
    carriers = own.max(-1).reshape(*table.shape, -1)[:, 0]  # (G, R')
    positions = carriers[inside.reshape(*table.shape, -1)[:, 0]]
    return _Source(tokens, merged, first_rows, num_rows, earlier), positions
