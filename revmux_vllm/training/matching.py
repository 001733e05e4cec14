"""Composites that look like the backbone's own rows before the first step of training.

Learning rates that suit adapters change a scale by a few per cent in a hundred steps, and the
channels of a pretrained decoder differ a thousandfold. So the scale is measured, not learned.
"""

import torch
from torch import Tensor

from revmux_vllm.adapters.kinds import AdapterLadder, Composite
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.training.features import Features

NUM_ROWS = 4096  # that are looked at


@torch.no_grad()
def match_composites(ladder: AdapterLadder, backbone: Backbone, features: Features) -> None:
    """Set scale and shift of every composite of ``ladder`` by rows of ``features``."""
    device = next(ladder.parameters()).device
    for path, adapters in ladder.by_path():
        if isinstance(path, Composite):
            rung = adapters[0].rung
            sequences = some_rows(features, NUM_ROWS, rung.shortening, backbone.ends.has_sink)
            rows = sequences.mean(1)  # as they are merged before training
            whole = len(rows) // rung.mux * rung.mux
            path.mux.match(rows[:whole].unflatten(0, (-1, rung.mux)).to(device))


def some_rows(features: Features, count: int, neighbours: int, has_sink: bool) -> Tensor:
    """At most ``count`` prefill states with their next neighbours, (P, neighbours, D), drawn with
    torch's seed.

    Args:
        features: of the rows to train on.
        count: most that are drawn.
        neighbours: rows of one sequence that are drawn together.
        has_sink: leave first rows out.
    """
    total = len(features.hidden)
    is_start = torch.zeros(total + neighbours, dtype=torch.bool)
    is_start[features.starts] = True
    is_start[0] = True  # of what they all begin with
    is_start[total:] = True
    refused = is_start[:total].clone() if has_sink else torch.zeros(total, dtype=torch.bool)
    for step in range(1, neighbours):  # never over the end of a sequence
        refused |= is_start[step : step + total]
    allowed = (~refused).nonzero().flatten()
    drawn = allowed[torch.randperm(len(allowed))[:count]]
    return features.hidden[drawn[:, None] + torch.arange(neighbours)]
