"""The reference answer: a padded transformers batch run under a given plan.

Training, evaluation and the engine's parity tests all go through these functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revmux_vllm.adapters import AdapterLadder, ExitHead, RungAdapter
from revmux_vllm.backbones.base import Backbone, inside
from revmux_vllm.merging import TokenMerge, merged_tokens
from revmux_vllm.rungs import Rung


def skip_state(hidden: Tensor, lengths: Tensor, position: Tensor) -> Tensor:
    """What the prefill layers know of each sequence: its pooled row, and the mean over its tokens.

    Args:
        hidden: (B, T, D), right-padded.
        lengths: (B,) int64.
        position: (B,) int64, the pooled row (``Backbone.pooled_position``).

    Returns:
        (B, 2, D)
    """
    tokens = inside(lengths, hidden.shape[1]).unsqueeze(-1)  # (B, T, 1)
    mean = ((hidden.float() * tokens).sum(1) / lengths[:, None]).to(hidden.dtype)
    return torch.stack([rows_at(hidden, position), mean], dim=1)


def rows_at(hidden: Tensor, position: Tensor) -> Tensor:
    """One row of each sequence: (B, T, D) and (B,) to (B, D)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


@dataclass(frozen=True)
class Composites:
    """What the upper layers run on.

    Attributes:
        rows: (G, T', D).
        lengths: (G, N) rows that each member takes part in; the carrier's are the first.
        positions: (G, T') of every row in its sequence, where rows are merged tokens; else None.
        streams: (G, T', N, S) down-projected members before they are mixed; None where N is 1.
    """

    rows: Tensor
    lengths: Tensor
    positions: Tensor | None
    streams: Tensor | None


def multiplex(
    backbone: Backbone, adapter: RungAdapter, hidden: Tensor, lengths: Tensor
) -> Composites:
    """G composites of a rung.

    Args:
        backbone: says which token of a sequence is pooled.
        adapter: of the rung.
        hidden: (G, N, T, D) after the prefill layers, right-padded.
        lengths: (G, N) int64, the longest first.
    """
    rows, positions, streams = hidden, None, None
    if adapter.merger is not None:
        merged, flat, positions = merge(backbone, adapter.merger, hidden.flatten(0, 1), lengths)
        rows = merged.unflatten(0, lengths.shape)
        positions = positions.unflatten(0, lengths.shape)[:, 0]
        lengths = flat.view_as(lengths)
    if adapter.mux is None:
        return Composites(rows[:, 0], lengths, positions, None)
    num_groups, width, num_rows, hidden_size = rows.shape
    present = inside(lengths.flatten(), num_rows).view(num_groups, width, num_rows)
    streams = adapter.mux.down_project(
        rows.transpose(1, 2).reshape(-1, width, hidden_size),  # (G*T', N, D)
        present.transpose(1, 2).reshape(-1, width),
    )
    rows = adapter.mux.mix(streams).unflatten(0, (num_groups, num_rows))
    return Composites(rows, lengths, positions, streams.unflatten(0, (num_groups, num_rows)))


def merge(
    backbone: Backbone, merger: TokenMerge, hidden: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbouring rows of (B, T, D) merged: rows (B, R, D), rows (B,) of each, positions (B, R).

    A merged row stands at the position of its last token.
    """
    tokens, num_rows = merged_tokens(lengths.flatten(), merger.factor, backbone.pools_first)
    present = tokens >= 0  # (B, R, M)
    sequence = torch.arange(len(hidden), device=hidden.device)[:, None]
    rows = hidden[sequence, tokens.clamp(min=0).flatten(1)].unflatten(1, tokens.shape[1:])
    # Behind a sequence there is nothing to merge; its first slot stands in.
    present[..., 0] = True
    merged = merger(rows.flatten(0, 1), present.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    return merged, num_rows, tokens.amax(-1).clamp(min=0)


def demultiplex(
    backbone: Backbone,
    adapter: RungAdapter,
    out: Tensor,
    composites: Composites,
    hidden: Tensor,
    lengths: Tensor,
    with_skip: bool = True,
) -> Tensor:
    """The members' vectors (G, N, D) from the upper layers' output (G, T', D).

    ``hidden`` and ``lengths`` are those that ``multiplex`` was given. ``with_skip`` False: from the
    composite alone, which training asks for.
    """
    num_groups, width = lengths.shape
    skip = _skip_of_members(backbone, hidden, lengths) if with_skip else None
    position = backbone.output_position(composites.lengths.flatten())
    read_at = rows_at(out.repeat_interleave(width, 0), position)  # (G*N, D)
    stream = torch.arange(width, device=out.device).repeat(num_groups)
    return adapter.read(read_at, stream, skip).unflatten(0, (num_groups, width))


def exit_vectors(
    backbone: Backbone, exit_head: ExitHead, hidden: Tensor, lengths: Tensor
) -> Tensor:
    """Vectors (G, N, D) read off the prefill states; arguments as for ``multiplex``."""
    return exit_head(_skip_of_members(backbone, hidden, lengths)).unflatten(0, lengths.shape)


def _skip_of_members(backbone: Backbone, hidden: Tensor, lengths: Tensor) -> Tensor:
    """(G, N, T, D) and (G, N) to (G*N, 2, D)."""
    flat = lengths.flatten()
    return skip_state(hidden.flatten(0, 1), flat, backbone.pooled_position(flat))


def run_rung(backbone: Backbone, adapter: RungAdapter, hidden: Tensor, lengths: Tensor) -> Tensor:
    """The members' vectors (G, N, D) of G composites; arguments as for ``multiplex``."""
    if adapter.exit is not None:
        return exit_vectors(backbone, adapter.exit, hidden, lengths)
    composites = multiplex(backbone, adapter, hidden, lengths)
    out = backbone.upper(composites.rows, composites.lengths[:, 0], composites.positions)
    return demultiplex(backbone, adapter, out, composites, hidden, lengths)


@torch.no_grad()
def classify(
    backbone: Backbone,
    ladder: AdapterLadder,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    rungs: Sequence[Rung] | None = None,
) -> Tensor:
    """Logits (B, C) of token-id ``prompts`` under ``groups`` of their indices, carrier first.

    On the CPU, one group at a time, and without token types: single texts, not pairs.

    ``rungs``: at which each group runs; ``Rung()`` is the backbone alone. Default: composites of
    the groups' sizes, nothing merged.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    logits: dict[int, Tensor] = {}
    for group, rung in zip(groups, rungs or [Rung(1, len(g)) for g in groups], strict=True):
        own = lengths[list(group)]
        ids = torch.zeros(len(group), int(own.max()), dtype=torch.long)
        for row, index in enumerate(group):
            ids[row, : len(prompts[index])] = torch.as_tensor(prompts[index])
        hidden = backbone.lower(ids, own)
        if rung == Rung():
            vectors = rows_at(backbone.upper(hidden, own), backbone.output_position(own))
        else:
            vectors = run_rung(backbone, ladder[rung], hidden[None], own[None])[0]
        for index, row in zip(group, backbone.head(vectors), strict=True):
            logits[index] = row
    return torch.stack([logits[index] for index in range(len(prompts))])
