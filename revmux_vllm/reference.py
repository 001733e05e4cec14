"""The reference answer: a padded transformers batch run under a given plan.

Training, evaluation and the engine's parity tests all go through these functions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revmux_vllm.adapters.kinds import AdapterLadder, Path, RungAdapter
from revmux_vllm.adapters.merging import merged_tokens
from revmux_vllm.backbones.base import Backbone, inside
from revmux_vllm.rungs import Ends, Rung


def skip_state(
    hidden: Tensor, lengths: Tensor, position: Tensor, before: Tensor | None = None
) -> Tensor:
    """What the prefill layers know of each sequence: its pooled row, and the mean over its tokens.

    Args:
        hidden: (B, T, D), right-padded.
        lengths: (B,) int64.
        position: (B,) int64, the pooled row (``Backbone.pooled_position``).
        before: (1, P, D), what all sequences begin with and ``hidden`` has not; ``lengths`` and
            ``position`` count it.

    Returns:
        (B, 2, D)
    """
    first = 0 if before is None else before.shape[1]
    tokens = inside(lengths - first, hidden.shape[1]).unsqueeze(-1)  # (B, T, 1)
    total = (hidden.float() * tokens).sum(1)
    if before is not None:
        total = total + before.float().sum(1)
    mean = (total / lengths[:, None]).to(hidden.dtype)
    return torch.stack([rows_at(hidden, position - first), mean], dim=1)


def rows_at(hidden: Tensor, position: Tensor) -> Tensor:
    """One row of each sequence: (B, T, D) and (B,) to (B, D)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


@dataclass(frozen=True)
class Passed:
    """G composites of N members behind the upper layers, where each member is read.

    Attributes:
        rows: (G*N, D) by the layer where a rung stops, 0 for the end; the state (G*N, 2, D) where
            ``Rung.reads_state``; empty where no layer ran.
        stream: (G*N,) which stream of its composite each member is.
        skip: (G*N, 2, D), see ``skip_state``.
        streams: (G, T', N, S) the members before they were mixed; None where nothing is.
    """

    rows: dict[int, Tensor]
    stream: Tensor
    skip: Tensor
    streams: Tensor | None

    def read(self, adapter: RungAdapter, with_skip: bool = True) -> Tensor:
        """The members' vectors (G, N, D) of one rung of the path."""
        rows = self.rows.get(adapter.rung.stop)
        vectors = adapter.read(rows, self.stream, self.skip if with_skip else None)
        return vectors.unflatten(0, (-1, adapter.rung.mux))


def run_path(
    backbone: Backbone,
    adapters: Sequence[RungAdapter],
    hidden: Tensor,
    lengths: Tensor,
    shared: int = 0,
) -> Passed:
    """Run G composites through the upper layers, as far as any of the rungs of a path needs.

    Args:
        backbone: frozen.
        adapters: of the rungs; their path is one.
        hidden: (G, N, T, D) after the prefill layers, right-padded.
        lengths: (G, N) int64, the longest first.
        shared: so many tokens all sequences begin with, and all have more; of a causal backbone.
            Their upper rows run once.
    """
    rung, path = adapters[0].rung, adapters[0].path
    num_groups, width = lengths.shape
    flat = lengths.flatten()
    skip = skip_state(hidden.flatten(0, 1), flat, backbone.pooled_position(flat))
    stream = torch.arange(width, device=lengths.device).repeat(num_groups)
    if rung.exit:
        return Passed({}, stream, skip, None)
    tokens, positions = None, None
    if rung.shortening > 1:
        tokens, flat = merged_tokens(flat, rung.shortening, backbone.ends)
        # A merged row stands at the position of its last token.
        positions = tokens.amax(-1).clamp(min=0).unflatten(0, lengths.shape)[:, 0]
        tokens = tokens.unflatten(0, lengths.shape)
    counts = flat.view_as(lengths)
    split = whole_rows(shared, rung.shortening, backbone.ends)
    rows, streams = upper_rows(path, hidden, counts, tokens, backbone.ends, split)
    before: Tensor | None = None
    if split:
        before, _ = upper_rows(path, hidden[:1], counts[:1], tokens, backbone.ends, 0, split)
    carriers = counts[:, 0]
    read_at: dict[int, Tensor] = {}
    layer = backbone.prefill_layers
    for stop in sorted({adapter.rung.stop for adapter in adapters}, key=lambda s: s or math.inf):
        until, cache = stop or backbone.num_layers, None
        if before is not None:
            cache, alike = backbone.prefix_cache(layer), carriers[:1] * 0 + split
            its = None if positions is None else positions[:1, :split]
            before = backbone.between(before, alike, its, layer, until, cache)
        behind = None if positions is None else positions[:, split:]
        rows = backbone.between(rows, carriers, behind, layer, until, cache)
        position = backbone.pooled_position(flat)
        if not stop:
            final, position = backbone.finish(rows, carriers), backbone.output_position(flat)
            read_at[stop] = rows_at(final.repeat_interleave(width, 0), position - split)
        elif width == 1:
            read_at[stop] = skip_state(rows, flat, position, before)
        else:
            read_at[stop] = rows_at(rows.repeat_interleave(width, 0), position - split)
        layer = stop
    return Passed(read_at, stream, skip, streams)


def whole_rows(shared: int, factor: int, ends: Ends) -> int:
    """Upper rows that belong to the first ``shared`` tokens of a longer sequence alone."""
    first = ends.kept[0] if factor > 1 else 0
    return max(0, shared - first) // factor + min(shared, first)


def upper_rows(
    path: Path,
    hidden: Tensor,
    counts: Tensor,
    tokens: Tensor | None,
    ends: Ends,
    first: int,
    last: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Some rows (G, T', D) of composites, and their streams, merged and mixed.

    Args:
        path: of the rungs.
        hidden: (G, N, T, D) after the prefill layers.
        counts: (G, N) rows of every member.
        tokens: (G, N, R, M) of which tokens rows are merged, as ``merged_tokens`` has them; None
            where they are not.
        ends: of the backbone.
        first, last: rows, ``last`` not among them.
    """
    rows = hidden[:, :, first:last]
    if tokens is not None:
        rows = merge(path, hidden, tokens[: len(hidden), :, first:last])
    return multiplex(path, rows, counts.flatten(), ends, first)


def merge(path: Path, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Neighbouring rows of (G, N, T, D) merged to (G, N, R, D), by ``tokens`` (G, N, R, M)."""
    flat, members = tokens.flatten(0, 1), hidden.flatten(0, 1)
    present = flat >= 0  # (B, R, M)
    sequence = torch.arange(len(members), device=hidden.device)[:, None]
    rows = members[sequence, flat.clamp(min=0).flatten(1)].unflatten(1, flat.shape[1:])
    # Behind a sequence there is nothing to merge; its first slot stands in.
    present[..., 0] = True
    merged = path.merge(rows.flatten(0, 1), present.flatten(0, 1))
    return merged.view(*tokens.shape[:3], -1)


def multiplex(
    path: Path, rows: Tensor, lengths: Tensor, ends: Ends, first: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Composite rows (G, T', D), and their streams, from members' rows (G, N, T', D).

    ``lengths`` (G*N,): rows of each member; ``first``: of them that are here.
    """
    num_groups, width, num_rows, hidden_size = rows.shape
    present = inside(lengths - first, num_rows).view(num_groups, width, num_rows)
    sinks = None
    if ends.has_sink:  # unless a member is read there, having no other row
        is_apart = lengths.view(num_groups, width).amin(1) > 1  # (G,)
        is_first = torch.arange(num_rows, device=rows.device) == -first  # (T',)
        sinks = (is_apart[:, None] & is_first).flatten()
    mixed, streams = path.multiplex(
        rows.transpose(1, 2).reshape(-1, width, hidden_size),  # (G*T', N, D)
        present.transpose(1, 2).reshape(-1, width),
        sinks,
    )
    shape = num_groups, num_rows
    return mixed.unflatten(0, shape), None if streams is None else streams.unflatten(0, shape)


def run_rung(
    backbone: Backbone, adapter: RungAdapter, hidden: Tensor, lengths: Tensor, shared: int = 0
) -> Tensor:
    """The members' vectors (G, N, D) of G composites; arguments as for ``run_path``."""
    return run_path(backbone, [adapter], hidden, lengths, shared).read(adapter)


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
