"""How sure an answer is: by how much it leads at this stop, and at those before it."""

import torch
from torch import Tensor


def margins(answers: Tensor) -> Tensor:
    """Leads (B, S) of the last stop's answer, at every stop so far.

    Args:
        answers: (B, S, C) logits at S stops, C at least 2.

    Returns:
        Log probability of that answer less that of the likeliest other one.
    """
    logp = answers.log_softmax(-1)
    answer = answers[:, -1].argmax(-1)  # (B,)
    at = answer[:, None, None].expand(-1, answers.shape[1], 1)
    others = logp.scatter(-1, at, -torch.inf).amax(-1)
    return logp.gather(-1, at).squeeze(-1) - others


def trust(answers: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Log odds (B,) that the last stop's answer is the backbone's.

    Args:
        answers: as for ``margins``.
        weights: (S,).
        bias: ().
    """
    return margins(answers.float()) @ weights + bias
