"""Accuracy as method and protocol have it: ten shuffled groupings, beside the backbone's own."""

from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.backbones import LlamaBackbone
from revmux_vllm.packing import pack
from revmux_vllm.reference import demultiplex, multiplex
from revmux_vllm.training.features import Features

NUM_GROUPINGS = 10
WINDOW = 64  # requests that wait together and are packed together


@torch.no_grad()
def predict(
    backbone: LlamaBackbone,
    ladder: AdapterLadder,
    features: Features,
    groups: list[tuple[int, ...]],
    composites_per_batch: int = 32,
) -> Tensor:
    """Logits (B, C) under ``groups`` of rows; a group of one is the backbone's own answer."""
    logits = features.logits.clone()
    for width, adapter in ladder.items():
        index = torch.tensor([group for group in groups if len(group) == width])
        if not len(index):
            continue
        index = index[features.lengths[index[:, 0]].argsort()]
        for part in index.split(composites_per_batch):
            lengths = features.lengths[part]
            hidden = features.padded(part.flatten()).unflatten(0, (-1, width))
            out = backbone.upper(multiplex(adapter, hidden, lengths))
            vectors = demultiplex(adapter, out, hidden, lengths)
            logits[part.flatten()] = backbone.head(vectors).flatten(0, 1)
    return logits


def groupings(lengths: list[int], width: int, widths: tuple[int, ...], window: int) -> Any:
    """Ten groupings from fixed seeds: shuffle, cut into windows, pack each as serving does."""
    allowed = [w for w in widths if w <= width]
    for seed in range(NUM_GROUPINGS):
        order = np.random.default_rng(seed).permutation(len(lengths))
        groups: list[tuple[int, ...]] = []
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            packed = pack([lengths[row] for row in rows], allowed)
            groups += [tuple(int(rows[i]) for i in group) for group in packed]
        yield groups


def evaluate(
    backbone: LlamaBackbone, ladder: AdapterLadder, features: Features, window: int = WINDOW
) -> dict[str, Any]:
    """The report that ``revmux eval --json`` prints; shares between 0 and 1."""
    own = features.logits.argmax(-1)
    lengths = features.lengths.tolist()
    widths = ladder.config.widths
    report: dict[str, Any] = {"backbone": {"accuracy": _share(own == features.labels)}}
    report["widths"] = {}
    for width in track(widths, "groupings"):
        accuracy, agreement = [], []
        for groups in groupings(lengths, width, widths, window):
            answer = predict(backbone, ladder, features, groups).argmax(-1)
            accuracy.append(_share(answer == features.labels))
            agreement.append(_share(answer == own))
        report["widths"][str(width)] = {
            "prefill_layers": ladder.config.prefill_layers,
            "accuracy": _summary(accuracy),
            "agreement": _summary(agreement),
        }
    return report


def _share(hits: Tensor) -> float:
    return hits.float().mean().item()


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
