"""Labels that stand in another order than the backbone's classes are noticed before training."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from revmux_vllm.problems import Problem
from revmux_vllm.training.features import Features
from revmux_vllm.training.losses import UNLABELLED
from revmux_vllm.training.scores import correlation

MUCH_BETTER = 0.2
"""By which another order must agree more often to be named."""

logger = logging.getLogger(__name__)


def warn_of_another_order(own: Features, names: Sequence[str], problem: Problem) -> None:
    """Compare the labels with what the frozen backbone says of the same rows, and warn.

    Args:
        own: rows, of which those without a label do not count.
        names: of the classes.
        problem: what labels are.
    """
    if problem is Problem.VALUES:
        there = ~own.labels.isnan().any(-1)
        if there.any() and correlation(own.logits[there], own.labels[there]) < 0:
            logger.warning("labels are the higher the lower the frozen backbone's values are")
        return
    said, labelled = own.logits.argmax(-1), own.labels != UNLABELLED
    right = (said == own.labels)[labelled].float()
    if not len(right):
        return
    chance, agreed = 1 / own.logits.shape[-1], right.mean().item()
    better = ""
    if problem is Problem.ONE_CLASS:
        better = _better_order(own.labels[labelled], said[labelled], names, agreed)
    if agreed < chance or better:
        logger.warning(
            "labels and the frozen backbone agree on %.1f %% of %d rows (chance %.1f %%). Are the "
            "classes in another order than the backbone's, %s?%s",
            *(100 * agreed, len(right), 100 * chance, ", ".join(names), better),
        )


def _better_order(
    labels: torch.Tensor, said: torch.Tensor, names: Sequence[str], agreed: float
) -> str:
    """Which classes the labels would agree with most, if that is much more; or nothing."""
    from scipy.optimize import linear_sum_assignment

    count = len(names)
    table = torch.bincount(labels * count + said, minlength=count**2).view(count, count).numpy()
    rows, classes = linear_sum_assignment(-table)
    best = float(np.trace(table[:, classes])) / len(labels)
    if best < agreed + MUCH_BETTER:
        return ""
    moved = [f"{names[i]} as {names[c]}" for i, c in zip(rows, classes, strict=True) if i != c]
    return f" Read otherwise they would agree on {100 * best:.1f} %: {', '.join(moved)}."
