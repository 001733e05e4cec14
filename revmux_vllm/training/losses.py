"""What the adapters learn from: the labels and the frozen backbone itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELLED = -1


def answer_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy, half on the label and half on the backbone's own distribution.

    Args:
        logits: (B, C).
        labels: (B,) int64; a row that is ``UNLABELLED`` learns from the backbone alone.
        teacher_logits: (B, C), of the same rows run alone.
    """
    target = teacher_logits.softmax(-1)
    labelled = (labels != UNLABELLED).unsqueeze(-1)
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(target.dtype)
    return F.cross_entropy(logits, torch.where(labelled, 0.5 * (one_hot + target), target))


def vector_loss(vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    """One minus the cosine between the vectors (B, D) and the backbone's own pooled vectors."""
    return 1 - F.cosine_similarity(vectors, teacher_vectors, dim=-1).mean()


def random_groups(lengths: Tensor, width: int) -> Tensor:
    """Rows of a batch in random composites (G, N), carrier first, as serving orders members.

    ``len(lengths)`` must be a multiple of ``width``.
    """
    groups = torch.randperm(len(lengths)).unflatten(0, (-1, width))  # (G, N)
    order = lengths[groups].argsort(dim=1, descending=True, stable=True)
    return groups.gather(1, order)
