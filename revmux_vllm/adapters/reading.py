"""How the vector that the backbone's head reads is made from what a rung has left of a sequence."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Reader(nn.Module, ABC):
    """Behind the layers that a rung runs."""

    @abstractmethod
    def forward(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        """The vectors (M, D) of M members, which the backbone's head reads.

        Args:
            rows: (M, D), where each member is read: the final states, or the hidden states after
                the layer where the rung stops. None where no upper layer ran. Where
                ``Rung.reads_state`` (M, 2, D): what ``skip`` is, after that layer.
            stream: (M,) int64, which stream of its composite a member is.
            skip: (M, 2, D), what the prefill layers know of each member: its pooled row, and the
                mean over its tokens. None: answer without it.
        """


class Refiner(Reader):
    """Corrects the final state, knowing the prefill state. Untrained it corrects nothing.

    Args:
        hidden_size: D of the backbone.
        inner_size: width of the inner layer.
        skip: read the prefill state.
    """

    def __init__(self, hidden_size: int, inner_size: int, skip: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.skip_norm = nn.RMSNorm(hidden_size, eps=1e-6) if skip else None
        self.correction = correction((1 + 2 * skip) * hidden_size, inner_size, hidden_size)

    def forward(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        """See ``Reader``."""
        assert rows is not None
        known = [self.norm(rows)]
        if self.skip_norm is not None:
            assert skip is not None
            known.append(self.skip_norm(skip).flatten(1))
        return rows + self.correction(torch.cat(known, dim=-1))


class EarlyReader(Reader):
    """Three linear layers on the state where the rung stops; see ``Rung.reads_state``.

    Args:
        hidden_size: D of the backbone.
        inner_size: width of the inner layers.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.skip_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.layers = three_layers(2 * hidden_size, inner_size, hidden_size)

    def forward(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        """See ``Reader``."""
        state = skip if rows is None else rows
        assert state is not None
        return self.layers(self.skip_norm(state).flatten(1))


class ExitHead(nn.Module):
    """Early exit as it is measured beside the rungs: logits from the state after some layer.

    Args:
        hidden_size: D of the backbone.
        inner_size: width of the inner layers.
        num_labels: C.
    """

    def __init__(self, hidden_size: int, inner_size: int, num_labels: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.layers = three_layers(2 * hidden_size, inner_size, num_labels)

    def forward(self, skip: Tensor) -> Tensor:
        """States (B, 2, D), as ``skip_state`` makes them, to (B, C)."""
        return self.layers(self.norm(skip).flatten(-2))


def three_layers(in_size: int, inner_size: int, out_size: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    return nn.Sequential(
        nn.Linear(in_size, inner_size),
        nn.ReLU(),
        nn.Linear(inner_size, inner_size),
        nn.ReLU(),
        nn.Linear(inner_size, out_size),
    )


def correction(in_size: int, inner_size: int, out_size: int) -> nn.Sequential:
    """An MLP that is zero until it is trained."""
    last = nn.Linear(inner_size, out_size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(in_size, inner_size), nn.ReLU(), last)
