"""The adaptive rival: a request leaves at the first early exit that is sure enough.

Sure is the largest probability of an exit's answer, and how sure is enough is chosen once, on rows
that neither trained the exits nor measure them: the least that still agrees with the backbone as
often as is asked for. Related: BERxiT (Xin et al., 2021), CALM (Schuster et al., 2022).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from revmux_vllm.checkpoint import write_whole
from revmux_vllm.training.exits import EXIT_FOLDER
from revmux_vllm.training.scores import alike, share

TARGETS = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9)
"""Agreements with the backbone that thresholds are chosen for."""
CASCADE_FILE = EXIT_FOLDER / "cascade.json"
STEPS = 512
"""Thresholds that are tried."""


@dataclass(frozen=True)
class Walk:
    """What a cascade did.

    Attributes:
        answers: (B, ...) probabilities.
        place: (B,) which exit each row left at; the number of exits where it went to the end.
    """

    answers: Tensor
    place: Tensor


def walk(exits: Tensor, own: Tensor, threshold: float) -> Walk:
    """Let every row leave at the first exit that is at least ``threshold`` sure.

    Args:
        exits: (B, E, ...) probabilities after each exit, over the last dimension.
        own: (B, ...) the backbone's.
        threshold: on the largest probability; of several labels at once on that of each.
    """
    sure = (exits.amax(-1, keepdim=True) >= threshold).flatten(2).all(-1)  # (B, E)
    there = torch.cat([sure, torch.ones_like(sure[:, :1])], dim=1).int()
    place = there.argmax(1)
    every = torch.cat([exits, own[:, None]], dim=1)
    return Walk(every[torch.arange(len(own)), place], place)


def calibrate(exits: Tensor, own: Tensor) -> dict[float, float]:
    """The lowest threshold for each of ``TARGETS`` that keeps it on these rows; see ``walk``."""
    found: dict[float, float] = {}
    tried = torch.linspace(1 / own.shape[-1], 1, STEPS).tolist()
    agreements = [share(alike(walk(exits, own, threshold).answers, own)) for threshold in tried]
    for target in TARGETS:
        # Not the first that keeps it by chance: every higher one must keep it too.
        failing = [t for t, kept in zip(tried, agreements, strict=True) if kept < target]
        found[target] = next((t for t in tried if t > max(failing, default=0.0)), 2.0)
    return found


def save(folder: Path, thresholds: dict[float, float]) -> None:
    """Write them beside the exits of a checkpoint."""
    text = json.dumps({str(target): value for target, value in thresholds.items()}, indent=1)
    write_whole(folder / CASCADE_FILE, text.encode() + b"\n")


def load(folder: Path) -> dict[float, float]:
    """Of a checkpoint; empty if it has none."""
    path = folder / CASCADE_FILE
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return {float(target): float(value) for target, value in values.items()}


def speedup(place: Tensor, costs: Sequence[float]) -> float:
    """Against the backbone.

    Args:
        place: (B,) as in ``Walk``.
        costs: share of the backbone's cost that each exit has cost with all before it, and last
            what it costs to go to the end.
    """
    return 1 / torch.tensor(costs)[place].mean().item()
