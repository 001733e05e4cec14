"""Early exit: an answer from what is known after some layer."""

from torch import Tensor, nn


class ExitHead(nn.Module):
    """Three linear layers on the pooled row and the mean row of some layer.

    Args:
        hidden_size: D of the backbone.
        inner_size: width of the inner layers.
        out_size: what comes out; D for a vector that the backbone's own head reads.
    """

    def __init__(self, hidden_size: int, inner_size: int, out_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.RMSNorm(hidden_size, eps=1e-6),
            nn.Flatten(-2),
            nn.Linear(2 * hidden_size, inner_size),
            nn.ReLU(),
            nn.Linear(inner_size, inner_size),
            nn.ReLU(),
            nn.Linear(inner_size, out_size),
        )

    def forward(self, skip: Tensor) -> Tensor:
        """States (B, 2, D), as ``skip_state`` makes them, to (B, out_size)."""
        return self.layers(skip)
