"""What the adapters learn from: the labels and the frozen backbone itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELLED = -1
TEMPERATURE = 1 / 20  # of InfoNCE, as the reference code has it


def answer_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor, label_share: float = 0.5
) -> Tensor:
    """Cross-entropy, in part on the label and in part on the backbone's own distribution.

    Args:
        logits: (B, C), or of several labels at once (B, C, 2).
        labels: (B,) int64, or (B, C); what is ``UNLABELLED`` learns from the backbone alone.
        teacher_logits: as ``logits``, of the same rows run alone.
        label_share: weight of the label, between 0 and 1.
    """
    target = teacher_logits.softmax(-1)
    labelled = (labels != UNLABELLED).unsqueeze(-1)
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(target.dtype)
    both = label_share * one_hot + (1 - label_share) * target
    wanted = torch.where(labelled, both, target)
    return F.cross_entropy(logits.flatten(0, -2), wanted.flatten(0, -2))


def value_loss(
    values: Tensor, labels: Tensor, teacher_values: Tensor, label_share: float = 0.5
) -> Tensor:
    """Mean squared error, in part from the label and in part from the backbone's own value, over
    the variance of these.

    Args:
        values: (B, C).
        labels: (B, C); NaN learns from the backbone alone.
        teacher_values: (B, C), of the same rows run alone.
        label_share: weight of the label, between 0 and 1.
    """
    both = label_share * labels + (1 - label_share) * teacher_values
    wanted = torch.where(labels.isnan(), teacher_values, both)
    return F.mse_loss(values, wanted) / teacher_values.var(unbiased=False).clamp(min=1e-6)


def vector_loss(vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    """One minus the cosine between the vectors (B, D) and the backbone's own pooled vectors."""
    return 1 - F.cosine_similarity(vectors, teacher_vectors, dim=-1).mean()


def info_nce(vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    """Each vector (B, D) must find its own teacher among the batch's (the paper's loss)."""
    similarity = F.normalize(vectors, dim=-1) @ F.normalize(teacher_vectors, dim=-1).T  # (B, B)
    return F.cross_entropy(
        similarity / TEMPERATURE, torch.arange(len(vectors), device=vectors.device)
    )


def stream_similarity(streams: Tensor) -> Tensor:
    """Mean |cosine| between different streams (..., N, S) of a composite row (the paper's loss).

    A stream that has ended is zero, and counts as orthogonal.
    """
    unit = F.normalize(streams, dim=-1)
    cosine = unit @ unit.transpose(-1, -2)  # (..., N, N)
    width = streams.shape[-2]
    pairs = torch.triu_indices(width, width, offset=1)
    return cosine[..., pairs[0], pairs[1]].abs().mean()


def random_groups(lengths: Tensor, width: int) -> Tensor:
    """Rows of a batch in random composites (G, N), carrier first, as serving orders members.

    What is left of ``len(lengths)`` over a multiple of ``width`` is in no group.
    """
    count = len(lengths) // width * width
    groups = torch.randperm(len(lengths), device=lengths.device)[:count].unflatten(0, (-1, width))
    order = lengths[groups].argsort(dim=1, descending=True, stable=True)
    return groups.gather(1, order)
