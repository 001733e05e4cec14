"""The reversible coupling that mixes N streams, and its exact inverse.

One chain serves every N (paper section 3.2 for two streams, the reference code for more):

    y_0 = x_{N-1} + f_0(x_{N-2})
    y_i = x_{N-1-i} + f_i(y_{i-1})        i = 1 .. N-1

It inverts exactly whatever the functions are, because each step subtracts what it added: the
inverse reads ``y`` from the end and needs only what it has already undone. Dropout inside a
function would break that, so there is none.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ReversibleCoupling(nn.Module):
    """Chain coupling of ``width`` streams of ``stream_size`` channels.

    Args:
        width: number of streams N, at least 2.
        stream_size: channels per stream S.
        make_function: builds one coupling function S -> S; injected so that tests and later
            adapters can choose another.
    """

    def __init__(
        self, width: int, stream_size: int, make_function: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"width: expected at least 2 streams, found {width}")
        if stream_size < 1:
            raise ValueError(f"stream_size: expected at least 1 channel, found {stream_size}")
        make = make_function or (lambda size: coupling_mlp(size, size * width))
        self.width = width
        self.functions = nn.ModuleList(make(stream_size) for _ in range(width))

    def forward(self, x: Tensor) -> Tensor:
        """Mix streams (..., N, S) into streams (..., N, S)."""
        self._check(x)
        y = [x[..., -1, :] + self.functions[0](x[..., -2, :])]
        for i in range(1, self.width):
            y.append(x[..., self.width - 1 - i, :] + self.functions[i](y[-1]))
        return torch.stack(y, dim=-2)  # (..., N, S)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo ``forward``: (..., N, S) to (..., N, S)."""
        self._check(y)
        x = [
            y[..., i, :] - self.functions[i](y[..., i - 1, :]) for i in range(self.width - 1, 0, -1)
        ]  # x_0 .. x_{N-2}
        x.append(y[..., 0, :] - self.functions[0](x[-1]))
        return torch.stack(x, dim=-2)  # (..., N, S)

    def _check(self, streams: Tensor) -> None:
        if streams.shape[-2] != self.width:
            raise ValueError(
                f"streams: expected (..., {self.width}, S), found {tuple(streams.shape)}"
            )


def coupling_mlp(stream_size: int, hidden_size: int) -> nn.Module:
    """S -> hidden -> S with ReLU, the paper's coupling function.

    The last layer starts small, so that at first a composite carries its streams side by side.
    """
    last = nn.Linear(hidden_size, stream_size)
    nn.init.normal_(last.weight, std=1e-2 / hidden_size**0.5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(stream_size, hidden_size), nn.ReLU(), last)
