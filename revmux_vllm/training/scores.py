"""How good answers are, and how near to the backbone's own: labels and probabilities."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revmux_vllm.problems import Problem

THRESHOLDS = (0.5, 0.9, 0.99)
"""Where users cut probabilities; agreement is counted at each."""


def compare(
    answers: Sequence[Tensor], own: Tensor, labels: Tensor, problem: Problem
) -> dict[str, Any]:
    """Scores of answers that were given in several groupings; shares between 0 and 1.

    Args:
        answers: probabilities or values (B, ...) of each grouping, see ``Problem``.
        own: (B, ...) the backbone's.
        labels: (B,) int64; of several labels (B, C); of values (B, C) floats.
        problem: what these are.

    Returns:
        ``accuracy`` and ``agreement`` with the backbone's answer, as mean, min and max over the
        groupings. Of several labels a row counts where all of them are right. Of values both are
        Pearson's correlation. ``probabilities``, see ``nearness``; ``confusion`` and ``per_class``,
        see ``by_class`` and ``by_label``.
    """
    told = {
        "agreement": _summary([agreement(one, own, problem) for one in answers]),
        "probabilities": nearness(torch.stack(list(answers)), own, labels, problem),
    }
    if problem is Problem.VALUES:
        return told | {"accuracy": _summary([correlation(one, labels) for one in answers])}
    classes = [one.argmax(-1) for one in answers]
    told["accuracy"] = _summary([share(_whole(c == labels)) for c in classes])
    if problem is Problem.LABELS:
        return told | by_label(classes, own.argmax(-1), labels)
    return told | by_class(classes, labels, own.shape[-1])


def agreement(answers: Tensor, own: Tensor, problem: Problem) -> float:
    """Share of ``alike`` answers; of values Pearson's correlation, the mean over the outputs."""
    return correlation(answers, own) if problem is Problem.VALUES else share(alike(answers, own))


def alike(answers: Tensor, own: Tensor) -> Tensor:
    """(B,) whether answers (B, ..., C) say the same, all labels of a row together."""
    return _whole(answers.argmax(-1) == own.argmax(-1))


def _whole(right: Tensor) -> Tensor:
    """(B, ...) to (B,): right everywhere."""
    return right.unsqueeze(-1).flatten(1).all(-1)


def correlation(values: Tensor, others: Tensor) -> float:
    """Pearson's, of every output (B, C), on average; 0 where one does not vary."""
    first, second = (v - v.mean(0) for v in (values.double(), others.double()))
    lengths = (first.norm(dim=0) * second.norm(dim=0)).clamp(min=1e-12)
    return ((first * second).sum(0) / lengths).mean().item()


def nearness(answers: Tensor, own: Tensor, labels: Tensor, problem: Problem) -> dict[str, Any]:
    """How far answers (G, B, ...) are from the backbone's (B, ...), and how well they rank.

    Returns:
        ``distance_mean`` and ``distance_p99`` of the largest difference over the classes, and of
        values over the outputs; ``same_side``: share of probabilities, of all rows and classes,
        that are on the same side of each of ``THRESHOLDS`` as the backbone's; ``auc``: area under
        the ROC curve against the labels, one class against the others, mean over the classes.
        The last two are None of values.
    """
    distance = (answers - own).abs().amax(-1).flatten()
    near = {
        "distance_mean": distance.mean().item(),
        "distance_p99": float(np.quantile(distance.numpy(), 0.99)),
        "same_side": dict.fromkeys(map(str, THRESHOLDS)),
        "auc": None,
    }
    if problem is Problem.VALUES:
        return near
    if problem is Problem.LABELS:  # of each label, yes is what a threshold is put on
        answers, own = answers[..., 1], own[..., 1]
        hits = labels == 1
    else:
        hits = labels[:, None] == torch.arange(own.shape[-1])
    sides = {str(t): share((answers > t) == (own > t)) for t in THRESHOLDS}
    return near | {
        "same_side": sides,
        "auc": sum(auc(one, hits) for one in answers) / len(answers),
    }


def auc(probabilities: Tensor, hits: Tensor) -> float:
    """Mean over the classes that some rows are of, and others not; NaN where there is none.

    Args:
        probabilities: (B, C).
        hits: (B, C) bool, which classes a row is of.
    """
    from sklearn.exceptions import UndefinedMetricWarning
    from sklearn.metrics import roc_auc_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        areas = [
            roc_auc_score(hits[:, c].numpy(), probabilities[:, c].numpy())
            for c in range(probabilities.shape[-1])
            if 0 < int(hits[:, c].sum()) < len(hits)
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


def by_label(classes: Sequence[Tensor], own: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores of every label by itself, yes against no: (B, C) answers, mean of the groupings.

    Returns:
        ``per_class``: ``precision``, ``recall`` and ``f1``, and ``agreement`` with the backbone.
    """
    given, count = torch.stack(list(classes)).double(), max(1, len(classes))
    hits = (given * (labels == 1)).sum((0, 1)) / count
    said, there = given.sum((0, 1)) / count, (labels == 1).sum(0)
    alike_by_label = (torch.stack(list(classes)) == own).double().mean((0, 1))
    return {
        "per_class": {
            "precision": (hits / said.clamp(min=1e-12)).tolist(),
            "recall": (hits / there.clamp(min=1e-12)).tolist(),
            "f1": (2 * hits / (said + there).clamp(min=1e-12)).tolist(),
            "agreement": alike_by_label.tolist(),
        }
    }


def share(hits: Tensor) -> float:
    """Of what is true."""
    return hits.float().mean().item()


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
