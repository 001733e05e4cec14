"""What a classifier's outputs mean: one class of several, several labels at once, or a value.

Everywhere else an answer is a distribution over its last dimension: (..., C) of one class, and of
every label by itself (..., C, 2), no and yes. Values (..., C) are no distribution.
"""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor


class Problem(StrEnum):
    """The ``problem_type`` of a transformers config."""

    ONE_CLASS = "single_label_classification"
    LABELS = "multi_label_classification"
    VALUES = "regression"

    def answers(self, logits: Tensor) -> Tensor:
        """Outputs (..., C) of a head as logits over the last dimension; values as they are.

        A single output of one class, a cross-encoder's, stands for no and yes, as each of several
        labels does: the softmax of a zero and the output is the sigmoid of the output.
        """
        if self is Problem.LABELS:
            return torch.stack([torch.zeros_like(logits), logits], dim=-1)
        if self is Problem.VALUES or logits.shape[-1] > 1:
            return logits
        return torch.cat([torch.zeros_like(logits), logits], dim=-1)

    def read(self, answers: Tensor) -> Tensor:
        """Answers as probabilities; values as they are."""
        return answers if self is Problem.VALUES else answers.softmax(-1)


def problem_of(config: Any, label_words: Any = None) -> Problem:
    """Of a transformers config; one class where it says nothing, and of label words."""
    named = None if label_words else getattr(config, "problem_type", None)
    return Problem(named or Problem.ONE_CLASS)
