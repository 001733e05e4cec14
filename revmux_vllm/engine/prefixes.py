"""Where rows and the prefixes before them lie in the cache's blocks: index arithmetic, no vLLM.

A sequence's tokens lie in its blocks one after the other, and so do the rows of what does not
merge. Where M tokens become one row, the rows of M blocks lie in the first of them. So what a block
holds, in any layer, follows from the tokens until the end of its M blocks, and sequences that begin
with these may share it.

Beside keys and values a prefix leaves two things that those who come later need: the sum over the
rows of a block, at the cut and wherever a mean is read, and the last token rows at the cut, which
may be merged with the first that come after.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

A = TypeVar("A", np.ndarray, Tensor)


@dataclass(frozen=True)
class RowBlocks:
    """Blocks of the cache.

    Attributes:
        size: tokens, or rows, of one.
        tail: token rows at the cut that are kept of a block, the last ones.
    """

    size: int
    tail: int


@dataclass(frozen=True)
class Parts(Generic[A]):
    """Rows in pieces, each of one block, and the blocks that come before them.

    Attributes:
        first: (S,) first row of every piece.
        owner, column: (S,) whose block it is, and the how manyth.
        goes_on: (S,) bool, rows of the block came in an earlier step.
        before_owner, before_column: (K,) whole blocks that came before, by owner.
        before_start: (O,) first of them of every owner.
        host_first: ``first`` as an array.
    """

    first: A
    owner: A
    column: A
    goes_on: A
    before_owner: A
    before_column: A
    before_start: A
    host_first: np.ndarray = field(metadata={"host": True})


@dataclass(frozen=True)
class Paging(Generic[A]):
    """Of one step.

    Attributes:
        lengths: (B,) tokens of every sequence, those in the cache too.
        tokens: parts of the batch's tokens; owners are its sequences.
        rows: parts of the upper rows; owners are composites.
        columns: (G, W) which of its carrier's blocks are a composite's, in order.
        row_group, row_column, row_offset: (U,) where every upper row lies.
        tail_row, tail_owner, tail_column, tail_place: (K,) token rows that are kept of a block.
        last_column: (B,) the block before every sequence's first token; 0 where there is none.
        size: of a block.
        table: (B, W') blocks of every sequence, on the device.
        row_table: (G, W) blocks of every composite, on the device.
        slots: (U,) of every upper row, on the device.
    """

    lengths: A
    tokens: Parts[A]
    rows: Parts[A]
    columns: A
    carriers: A
    row_group: A
    row_column: A
    row_offset: A
    tail_row: A
    tail_owner: A
    tail_column: A
    tail_place: A
    last_column: A
    size: int
    table: Any = field(default=None, metadata={"host": True})
    row_table: Any = field(default=None, metadata={"host": True})
    slots: Any = field(default=None, metadata={"host": True})


def page(
    blocks: RowBlocks,
    starts: np.ndarray,
    cached: np.ndarray,
    carriers: np.ndarray,
    shortening: np.ndarray,
    earlier: np.ndarray,
    upper_starts: np.ndarray,
    num_blocks: np.ndarray,
) -> Paging[np.ndarray]:
    """Where the rows of a step lie.

    Args:
        blocks: of the cache.
        starts: (B + 1,) first token row of every sequence.
        cached: (B,) its tokens that came before.
        carriers: (G,) sequence whose blocks a composite has.
        shortening: (G,) tokens of one of its rows.
        earlier: (G,) its rows that came before.
        upper_starts: (G + 1,) its first upper row.
        num_blocks: (B,) of every sequence.
    """
    size = blocks.size
    rows = earlier + np.diff(upper_starts)
    width = -(-int(rows.max(initial=0)) // size)
    # The last block is nobody else's: the few rows that the others have no room for lie there.
    last = num_blocks[carriers][:, None] - 1
    columns = np.minimum(shortening[:, None] * np.arange(width), last)
    group, place = _places(upper_starts, earlier)
    owner, token = _places(starts, cached)
    left = size - 1 - token % size  # of the block behind it
    tails = np.flatnonzero(left < blocks.tail)
    return Paging(
        lengths=cached + np.diff(starts),
        tokens=_parts(owner, token, cached // size, size),
        rows=_parts(group, place, earlier // size, size),
        columns=columns,
        carriers=carriers,
        row_group=group,
        row_column=place // size,
        row_offset=place % size,
        tail_row=tails,
        tail_owner=owner[tails],
        tail_column=token[tails] // size,
        tail_place=blocks.tail - 1 - left[tails],
        last_column=np.maximum(cached // size - 1, 0),
        size=size,
    )


def on_device(paging: Paging[Tensor], table: Tensor) -> Paging[Tensor]:
    """With the blocks themselves.

    Args:
        paging: its indices on the device.
        table: (B, W') blocks of every sequence.
    """
    row_table = table[paging.carriers].gather(1, paging.columns)
    slots = row_table[paging.row_group, paging.row_column].long() * paging.size + paging.row_offset
    return replace(paging, table=table, row_table=row_table, slots=slots)


def narrower(paging: Paging[Tensor], groups: Tensor, rows: Tensor) -> Paging[Tensor]:
    """Where some composites, and their rows, lie; its parts stay those of the whole step."""
    return replace(paging, row_table=paging.row_table[groups], slots=paging.slots[rows])


def _places(starts: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner of every row, and its place among the owner's, the first of which is ``first``."""
    counts = np.diff(starts)
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(starts[-1]) - starts[owner] + first[owner]


def _parts(owner: np.ndarray, place: np.ndarray, whole: np.ndarray, size: int) -> Parts[np.ndarray]:
    """Pieces of rows, by owner and place; ``whole`` blocks came before, of every owner."""
    begins = (place % size == 0) | (np.diff(owner, prepend=-1) > 0)
    first = np.flatnonzero(begins)
    before_start = np.cumsum(whole) - whole
    before_owner = np.repeat(np.arange(len(whole)), whole)
    return Parts(
        first=first,
        owner=owner[first],
        column=place[first] // size,
        goes_on=place[first] % size > 0,
        before_owner=before_owner,
        before_column=np.arange(len(before_owner)) - before_start[before_owner],
        before_start=before_start,
        host_first=first,
    )


class PrefixStates:
    """What a prefix leaves beside its keys and values, by block.

    Args:
        num_blocks: of the cache.
        like: rows (..., D), for size, dtype and device.
        layers: after which sums over rows are kept.
        tail: token rows at the cut that are kept of a block.
    """

    def __init__(self, num_blocks: int, like: Tensor, layers: Sequence[int], tail: int) -> None:
        shape = num_blocks, like.shape[-1]
        self.sums = {layer: like.new_zeros(shape, dtype=torch.float32) for layer in layers}
        self.tails = like.new_zeros(num_blocks, tail, like.shape[-1])

    def add(self, layer: int, rows: Tensor, parts: Parts[Tensor], table: Tensor) -> None:
        """Keep the sums over ``rows`` (U, D), the first ones of ``parts``, after ``layer``.

        Args:
            table: (O, W) blocks of their owners.
        """
        count = int(np.searchsorted(parts.host_first, len(rows)))
        if layer not in self.sums or not count:
            return
        sums = self.sums[layer]
        every = torch.arange(len(rows), device=rows.device)
        new = torch.nn.functional.embedding_bag(
            every, rows.float(), parts.first[:count], mode="sum"
        )
        blocks = table[parts.owner[:count], parts.column[:count]].long()
        sums[blocks] = torch.where(parts.goes_on[:count, None], sums[blocks], 0) + new

    def add_tokens(self, layer: int, tokens: Tensor, paging: Paging[Tensor]) -> None:
        """``add`` of the batch's tokens."""
        self.add(layer, tokens, paging.tokens, paging.table)

    def add_rows(self, layer: int, rows: Tensor, paging: Paging[Tensor]) -> None:
        """``add`` of upper rows."""
        self.add(layer, rows, paging.rows, paging.row_table)

    def before_tokens(self, layer: int, paging: Paging[Tensor]) -> Tensor:
        """Of every sequence (B, D)."""
        return self.before(layer, paging.tokens, paging.table)

    def before_rows(self, layer: int, paging: Paging[Tensor]) -> Tensor:
        """Of every composite (G, D)."""
        return self.before(layer, paging.rows, paging.row_table)

    def before(self, layer: int, parts: Parts[Tensor], table: Tensor) -> Tensor:
        """Sums (O, D) over the rows of every owner that came before, after ``layer``."""
        blocks = table[parts.before_owner, parts.before_column].long()
        return torch.nn.functional.embedding_bag(
            blocks, self.sums[layer], parts.before_start, mode="sum"
        )

    def keep_tails(self, tokens: Tensor, paging: Paging[Tensor]) -> None:
        """Of every block the last of ``tokens`` (num_tokens, D), which are at the cut."""
        blocks = paging.table[paging.tail_owner, paging.tail_column].long()
        self.tails[blocks, paging.tail_place] = tokens[paging.tail_row]

    def with_tails(self, tokens: Tensor, paging: Paging[Tensor]) -> Tensor:
        """``tokens`` (num_tokens, D), and behind them of every sequence the last ones before."""
        owners = torch.arange(len(paging.lengths), device=tokens.device)
        tails = self.tails[paging.table[owners, paging.last_column].long()]  # (B, tail, D)
        return torch.cat([tokens, tails.flatten(0, 1)])
