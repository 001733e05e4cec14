"""Accuracy as the protocol has it: ten shuffled groupings, beside the backbone and early exit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.config import layer_limit
from revmux_vllm.planning.packing import pack_rungs
from revmux_vllm.reference import run_rung
from revmux_vllm.rungs import Rung
from revmux_vllm.training.cost import Costs
from revmux_vllm.training.features import Features

NUM_GROUPINGS = 10
WINDOW = 64  # requests that wait together and are packed together

Groups = list[tuple[Rung, tuple[int, ...]]]
# Classes (B,) of all rows at one rung; the last argument is the order and windows of the rows, and
# the groups that these make.
Predict = Callable[[Rung, Groups, Sequence[Any]], Tensor]


@torch.no_grad()
def predict(
    backbone: Backbone,
    ladder: AdapterLadder,
    features: Features,
    groups: Groups,
    composites_per_batch: int = 32,
) -> Tensor:
    """Logits (B, C) under ``groups`` of rows; what runs alone is the backbone's own answer."""
    device = next(ladder.parameters()).device
    logits = features.logits.clone()
    for rung, adapter in ladder.items():
        index = torch.tensor([group for at, group in groups if at == rung])
        if not len(index):
            continue
        index = index[features.lengths[index[:, 0]].argsort()]
        for part in index.split(composites_per_batch):
            lengths = features.lengths[part].to(device)
            hidden = features.padded(part.flatten()).to(device).unflatten(0, (-1, rung.mux))
            vectors = run_rung(backbone, adapter, hidden, lengths).flatten(0, 1)
            logits[part.flatten()] = backbone.head(vectors).cpu()
    return logits


def windows(count: int, window: int) -> Iterator[list[Any]]:
    """Ten shuffles of ``count`` rows from fixed seeds, each cut into what waits together."""
    for seed in range(NUM_GROUPINGS):
        order = np.random.default_rng(seed).permutation(count)
        yield [order[start : start + window] for start in range(0, count, window)]


def group_windows(parts: Sequence[Any], lengths: Sequence[int], rungs: Sequence[Rung]) -> Groups:
    """Each window packed as serving packs it."""
    return [
        (rung, tuple(int(rows[i]) for i in group))
        for rows in parts
        for rung, group in pack_rungs([lengths[row] for row in rows], rungs)
    ]


def evaluate(
    backbone: Backbone,
    ladder: AdapterLadder,
    exits: nn.ModuleDict,
    features: Features,
    names: Sequence[str],
    window: int = WINDOW,
    answer: Predict | None = None,
) -> dict[str, Any]:
    """The report that ``revmux eval --json`` prints; shares between 0 and 1.

    Args:
        backbone: cut as ``ladder`` wants it.
        ladder: adapters to measure.
        exits: early exits to measure; their keys are the layers of ``features.exits``.
        features: of labelled rows.
        names: of the classes.
        window: requests that are packed together.
        answer: computes the classes, the backbone's own too; default: the reference on
            ``features``.
    """
    lengths = features.lengths.tolist()
    config = ladder.config
    costs = Costs(backbone, round(sum(lengths) / len(lengths)))

    def reference(rung: Rung, groups: Groups, parts: Sequence[Any]) -> Tensor:
        return predict(backbone, ladder, features, groups).argmax(-1)

    shuffles = list(windows(len(lengths), window))
    own = answer(Rung(), [], shuffles[0]) if answer else features.logits.argmax(-1)
    report: dict[str, Any] = {
        "backbone": scores([own], features) | {"accuracy": _share(own == features.labels)},
        "mean_tokens": sum(lengths) / len(lengths),
        "rungs": {},
    }
    # Without a composite the company does not matter: one round is all ten.
    rounds = [(r, s) for r in config.rungs for s in (shuffles if r.mux > 1 else shuffles[:1])]
    answers: dict[Rung, list[Tensor]] = {rung: [] for rung in config.rungs}
    for rung, parts in track(rounds, "groupings", console=Console(stderr=True)):
        groups = group_windows(parts, lengths, config.kind(rung))
        answers[rung].append((answer or reference)(rung, groups, parts))
    for rung, classes in answers.items():
        report["rungs"][str(rung)] = {
            "prefill_layers": config.prefill_layers,
            "layer_limit": layer_limit(rung, config.prefill_layers, backbone.num_layers),
            "speedup": costs.speedup(ladder, rung),
            "accuracy": _summary([_share(c == features.labels) for c in classes]),
            "agreement": _summary([_share(c == own) for c in classes]),
        } | scores(classes, features)
    return report | {"early_exit": _exit_rows(exits, features, own, costs), "classes": list(names)}


@torch.no_grad()
def _exit_rows(
    exits: nn.ModuleDict, features: Features, own: Tensor, costs: Costs
) -> list[dict[str, Any]]:
    rows = []
    for place, (layer, head) in enumerate(exits.items()):
        device = next(head.parameters()).device
        classes = head(features.exits[:, place].float().to(device)).argmax(-1).cpu()
        rows.append(
            {
                "layer": int(layer),
                "speedup": costs.exit_speedup(head, int(layer)),
                "accuracy": _share(classes == features.labels),
                "agreement": _share(classes == own),
            }
        )
    return rows


def scores(classes: Sequence[Tensor], features: Features) -> dict[str, Any]:
    """Scores by class, and the confusion matrix: labels down, answers across, mean of groupings."""
    count = features.logits.shape[-1]
    confusion = torch.zeros(count, count, dtype=torch.float64)
    for answer in classes:
        flat = features.labels * count + answer
        confusion += torch.bincount(flat, minlength=count**2).view(count, count) / len(classes)
    hits = confusion.diagonal()
    recall = hits / confusion.sum(1).clamp(min=1e-12)
    precision = hits / confusion.sum(0).clamp(min=1e-12)
    f1 = 2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp(min=1e-12)
    return {
        "confusion": confusion.tolist(),
        "per_class": {
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
        },
    }


def _share(hits: Tensor) -> float:
    return hits.float().mean().item()


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
