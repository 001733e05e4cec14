"""The reference answer: a padded transformers batch run under a given plan.

Training, evaluation and the engine's parity tests all go through these functions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from revmux_vllm.adapters import Adapter, AdapterLadder
from revmux_vllm.backbones.base import Backbone, inside


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


def streams_of(adapter: Adapter, hidden: Tensor, lengths: Tensor) -> Tensor:
    """Down-projected streams (G, T, N, S) of G composites; arguments as for ``multiplex``."""
    num_groups, width, num_tokens, hidden_size = hidden.shape
    present = inside(lengths.flatten(), num_tokens).view(num_groups, width, num_tokens)
    rows = hidden.transpose(1, 2).reshape(-1, width, hidden_size)  # (G*T, N, D)
    streams = adapter.down_project(rows, present.transpose(1, 2).reshape(-1, width))
    return streams.unflatten(0, (num_groups, num_tokens))


def compose(adapter: Adapter, streams: Tensor) -> Tensor:
    """Streams (G, T, N, S), as ``streams_of`` makes them, to composites (G, T, D)."""
    return adapter.mix(streams.flatten(0, 1)).unflatten(0, streams.shape[:2])


def multiplex(adapter: Adapter, hidden: Tensor, lengths: Tensor) -> Tensor:
    """G composites of the adapter's width.

    Args:
        hidden: (G, N, T, D) after the prefill layers, right-padded.
        lengths: (G, N) int64.

    Returns:
        (G, T, D), what the upper layers run on.
    """
    return compose(adapter, streams_of(adapter, hidden, lengths))


def demultiplex(
    backbone: Backbone,
    adapter: Adapter,
    out: Tensor,
    hidden: Tensor,
    lengths: Tensor,
    with_skip: bool = True,
) -> Tensor:
    """The members' vectors (G, N, D) from the upper layers' output (G, T, D).

    ``hidden`` and ``lengths`` are those that ``multiplex`` was given. ``with_skip`` False: from the
    composite alone, which training asks for.
    """
    num_groups, width = lengths.shape
    flat = lengths.flatten()
    skip = None
    if with_skip:
        skip = skip_state(hidden.flatten(0, 1), flat, backbone.pooled_position(flat))
    read_at = rows_at(out.repeat_interleave(width, 0), backbone.output_position(flat))  # (G*N, D)
    stream = torch.arange(width, device=out.device).repeat(num_groups)
    return adapter.demultiplex(read_at, stream, skip).unflatten(0, (num_groups, width))


@torch.no_grad()
def classify(
    backbone: Backbone,
    ladder: AdapterLadder,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
) -> Tensor:
    """Logits (B, C) of token-id ``prompts`` under ``groups`` of their indices, carrier first.

    A group of one runs through the backbone alone.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    logits: dict[int, Tensor] = {}
    for group in groups:
        own = lengths[list(group)]
        ids = torch.zeros(len(group), int(own.max()), dtype=torch.long)
        for row, index in enumerate(group):
            ids[row, : len(prompts[index])] = torch.as_tensor(prompts[index])
        hidden = backbone.lower(ids, own)
        if len(group) == 1:
            vectors = rows_at(backbone.upper(hidden, own), backbone.output_position(own))
        else:
            adapter = ladder[len(group)]
            out = backbone.upper(multiplex(adapter, hidden[None], own[None]), own[:1])
            vectors = demultiplex(backbone, adapter, out, hidden[None], own[None])[0]
        for index, row in zip(group, backbone.head(vectors), strict=True):
            logits[index] = row
    return torch.stack([logits[index] for index in range(len(prompts))])
