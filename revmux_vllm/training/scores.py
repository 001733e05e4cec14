"""How good answers are, and how near to the backbone's own: labels and probabilities."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

THRESHOLDS = (0.5, 0.9, 0.99)
"""Where users cut probabilities; agreement is counted at each."""


def compare(answers: Sequence[Tensor], own: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores of answers that were given in several groupings; shares between 0 and 1.

    Args:
        answers: probabilities (B, C) of each grouping.
        own: (B, C) the backbone's.
        labels: (B,) int64.

    Returns:
        ``accuracy`` and ``agreement`` with the backbone's label, as mean, min and max over the
        groupings; ``probabilities``, see ``nearness``; ``confusion`` and ``per_class``.
    """
    classes = [one.argmax(-1) for one in answers]
    return {
        "accuracy": _summary([share(c == labels) for c in classes]),
        "agreement": _summary([share(c == own.argmax(-1)) for c in classes]),
        "probabilities": nearness(torch.stack(list(answers)), own, labels),
    } | by_class(classes, labels, own.shape[-1])


def nearness(answers: Tensor, own: Tensor, labels: Tensor) -> dict[str, Any]:
    """How far probabilities (..., B, C) are from the backbone's (B, C), and how well they rank.

    Returns:
        ``distance_mean`` and ``distance_p99`` of the largest difference over the classes;
        ``same_side``: share of probabilities, of all rows and classes, that are on the same side of
        each of ``THRESHOLDS`` as the backbone's; ``auc``: area under the ROC curve against the
        labels, one class against the others, mean over the classes.
    """
    distance = (answers - own).abs().amax(-1).flatten()
    sides = {str(t): share((answers > t) == (own > t)) for t in THRESHOLDS}
    groupings = answers.reshape(-1, *own.shape)
    return {
        "distance_mean": distance.mean().item(),
        "distance_p99": distance.quantile(0.99).item(),
        "same_side": sides,
        "auc": sum(auc(one, labels) for one in groupings) / len(groupings),
    }


def auc(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over the classes that some rows are of, and others not; NaN where there is none."""
    from sklearn.exceptions import UndefinedMetricWarning
    from sklearn.metrics import roc_auc_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        areas = [
            roc_auc_score((labels == c).numpy(), probabilities[:, c].numpy())
            for c in range(probabilities.shape[-1])
            if 0 < int((labels == c).sum()) < len(labels)
        ]
    return float(sum(areas) / len(areas)) if areas else float("nan")


def by_class(classes: Sequence[Tensor], labels: Tensor, count: int) -> dict[str, Any]:
    """Scores by class, and the confusion matrix: labels down, answers across, mean of groupings."""
    confusion = torch.zeros(count, count, dtype=torch.float64)
    for answer in classes:
        flat = labels * count + answer
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


def share(hits: Tensor) -> float:
    """Of what is true."""
    return hits.float().mean().item()


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
