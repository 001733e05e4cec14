"""The reference answer: a padded transformers batch run under a given plan.

Training, evaluation and the engine's parity tests all go through these functions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from revmux_vllm.adapters import AdapterLadder, RevMuxAdapter
from revmux_vllm.backbones import LlamaBackbone


def skip_state(hidden: Tensor, lengths: Tensor) -> Tensor:
    """What the prefill layers know of each sequence: last token, and mean over tokens.

    Args:
        hidden: (B, T, D), right-padded.
        lengths: (B,) int64.

    Returns:
        (B, 2, D)
    """
    inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, T)
    total = (hidden.float() * inside.unsqueeze(-1)).sum(1)
    mean = (total / lengths[:, None]).to(hidden.dtype)
    return torch.stack([pooled_rows(hidden, lengths), mean], dim=1)


def pooled_rows(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The row of each sequence's last token: (B, T, D) to (B, D)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def multiplex(adapter: RevMuxAdapter, hidden: Tensor, lengths: Tensor) -> Tensor:
    """G composites of the adapter's width.

    Args:
        hidden: (G, N, T, D) after the prefill layers, right-padded.
        lengths: (G, N) int64.

    Returns:
        (G, T, D), what the upper layers run on.
    """
    num_groups, width, num_tokens, hidden_size = hidden.shape
    inside = torch.arange(num_tokens, device=hidden.device) < lengths[..., None]  # (G, N, T)
    rows = hidden.transpose(1, 2).reshape(-1, width, hidden_size)  # (G*T, N, D)
    composite = adapter.multiplex(rows, inside.transpose(1, 2).reshape(-1, width))
    return composite.unflatten(0, (num_groups, num_tokens))


def demultiplex(adapter: RevMuxAdapter, out: Tensor, hidden: Tensor, lengths: Tensor) -> Tensor:
    """The members' vectors (G, N, D) from the upper layers' output (G, T, D).

    ``hidden`` and ``lengths`` are those that ``multiplex`` was given.
    """
    num_groups, width = lengths.shape
    flat = lengths.flatten()
    read_at = pooled_rows(out.repeat_interleave(width, 0), flat)  # (G*N, D)
    stream = torch.arange(width, device=out.device).repeat(num_groups)
    vectors = adapter.demultiplex(read_at, stream, skip_state(hidden.flatten(0, 1), flat))
    return vectors.unflatten(0, (num_groups, width))


@torch.no_grad()
def classify(
    backbone: LlamaBackbone,
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
        hidden = backbone.lower(ids)
        if len(group) == 1:
            vectors = pooled_rows(backbone.upper(hidden), own)
        else:
            adapter = ladder[len(group)]
            out = backbone.upper(multiplex(adapter, hidden[None], own[None]))
            vectors = demultiplex(adapter, out, hidden[None], own[None])[0]
        for index, row in zip(group, backbone.head(vectors), strict=True):
            logits[index] = row
    return torch.stack([logits[index] for index in range(len(prompts))])
