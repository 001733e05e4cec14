"""Multiplexer and demultiplexer of one width.

A composite row is made from one row of each member. Only rows come in and only rows go out: which
rows belong together is the plan's matter, so the same code runs on a padded batch in training and
on vLLM's flat batch in the engine.

Three types, as the paper compares them (section 4; table 2 there): ``revmux`` mixes reversibly and
separates by the inverse, ``ora`` mixes reversibly and separates freely, ``vanilla`` does both
freely. Beyond the paper (docs/architecture.md has the reasons): one down-projection per stream,
normalised rows before it, channel by channel the mean and spread of the backbone's own rows after
it, and a skip connection from what the prefill layers already know of a member into its own output.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revmux_vllm.adapters.coupling import ReversibleCoupling
from revmux_vllm.adapters.reading import Reader, three_layers


class Multiplexer(nn.Module, ABC):
    """N sequences in, one composite; and back, as far as the inverse goes.

    Args:
        width: streams N; must divide ``hidden_size``.
        hidden_size: D of the backbone.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        if hidden_size % width:
            raise ValueError(f"width {width} does not divide hidden_size {hidden_size}")
        self.width = width
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.shift = nn.Parameter(torch.zeros(hidden_size))

    @abstractmethod
    def down_project(self, rows: Tensor, present: Tensor) -> Tensor:
        """Streams of R composite rows before they are mixed.

        Args:
            rows: (R, N, D), row r of every member.
            present: (R, N) bool; False where a member has already ended. Its stream is zero there.

        Returns:
            (R, N, S), or (R, N, D) for ``vanilla``.
        """

    @abstractmethod
    def combine(self, streams: Tensor) -> Tensor:
        """Streams (R, N, S) to rows (R, D) of any scale."""

    def mix(self, streams: Tensor) -> Tensor:
        """Streams (R, N, S) to composite rows (R, D)."""
        return self.combine(streams) * self.scale + self.shift

    def multiplex(self, rows: Tensor, present: Tensor) -> Tensor:
        """R composite rows (R, D) from rows (R, N, D) of the members; see ``down_project``."""
        return self.mix(self.down_project(rows, present))

    @torch.no_grad()
    def match(self, rows: Tensor) -> None:
        """Give composites of ``rows`` (R, N, D) the mean and spread that these have by channel.

        The upper layers are frozen and expect them, and channels differ a thousandfold.
        """
        there = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        combined = self.combine(self.down_project(rows, there))
        std, mean = torch.std_mean(rows.flatten(0, 1), dim=0)
        own_std, own_mean = torch.std_mean(combined, dim=0)
        self.scale.copy_(std / own_std.clamp(min=1e-6))
        self.shift.copy_(mean - own_mean * self.scale)


class ReversiblyMixed(Multiplexer):
    """The multiplexer of ``revmux`` and ``ora``: D to D/N per stream, then the coupling."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__(width, hidden_size)
        stream_size = hidden_size // width
        # In float32: there is no orthogonalisation in half precision.
        down = torch.empty(width, hidden_size, stream_size, dtype=torch.float32)  # (N, D, S)
        for weight in down.unbind():
            nn.init.orthogonal_(weight)
        self.down = nn.Parameter(down.to(torch.get_default_dtype()))
        self.coupling = ReversibleCoupling(width, stream_size)

    def down_project(self, rows: Tensor, present: Tensor) -> Tensor:
        streams = torch.einsum("rnd,nds->rns", self.norm(rows), self.down)
        return streams * present.unsqueeze(-1)

    def combine(self, streams: Tensor) -> Tensor:
        return self.coupling(streams).flatten(-2)


class FreelyMixed(Multiplexer):
    """The multiplexer of ``vanilla``: a D to D map per stream, then an MLP from N*D to 3D to D."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__(width, hidden_size)
        self.maps = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(width))
        self.mixer = nn.Sequential(
            nn.Linear(width * hidden_size, 3 * hidden_size),
            nn.ReLU(),
            nn.Linear(3 * hidden_size, hidden_size),
        )

    def down_project(self, rows: Tensor, present: Tensor) -> Tensor:
        normed = self.norm(rows)
        streams = [own(normed[:, i]) for i, own in enumerate(self.maps)]
        return torch.stack(streams, dim=1) * present.unsqueeze(-1)  # (R, N, D)

    def combine(self, streams: Tensor) -> Tensor:
        return self.mixer(streams.flatten(-2))


class Demultiplexer(Reader):
    """Members' vectors from the composite rows that they are read at, and what is known of them.

    Args:
        multiplexer: that mixed them.
        hidden_size: D of the backbone.
        inner_size: width of the inner layers.
        skip: let a member's own prefill state into its output.
    """

    def __init__(
        self, multiplexer: Multiplexer, hidden_size: int, inner_size: int, skip: bool
    ) -> None:
        super().__init__()
        in_size, out_size = self.separated_size(multiplexer.width, hidden_size)
        self.width = multiplexer.width
        self.skip_norm = nn.RMSNorm(hidden_size, eps=1e-6) if skip else None
        self.up = three_layers(in_size + 2 * hidden_size * skip, inner_size, out_size)
        self._mixed_by = (multiplexer,)  # not a submodule: its weights are stored once, elsewhere

    @staticmethod
    @abstractmethod
    def separated_size(width: int, hidden_size: int) -> tuple[int, int]:
        """Channels that ``up`` reads of a composite row, and channels that it makes."""

    def forward(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        """See ``Reader``; ``skip`` None: answer from the composite alone."""
        assert rows is not None
        return self.separate(rows, stream, skip)

    @abstractmethod
    def separate(self, rows: Tensor, stream: Tensor, skip: Tensor | None) -> Tensor:
        """As ``forward``, where there are rows."""

    def _with_skip(self, separated: Tensor, skip: Tensor | None) -> Tensor:
        if self.skip_norm is None:
            return separated
        if skip is None:
            normed = separated.new_zeros(len(separated), 2 * self.skip_norm.weight.shape[0])
        else:
            normed = self.skip_norm(skip).flatten(-2)  # (M, 2D)
        return torch.cat([separated, normed], dim=-1)


class Inverse(Demultiplexer):
    """Separated by the inverse of the very coupling that mixed (paper section 3)."""

    @staticmethod
    def separated_size(width: int, hidden_size: int) -> tuple[int, int]:
        return hidden_size // width, hidden_size

    def separate(self, rows: Tensor, stream: Tensor, skip: Tensor | None) -> Tensor:
        (mixed_by,) = self._mixed_by
        assert isinstance(mixed_by, ReversiblyMixed)
        streams = mixed_by.coupling.inverse(rows.unflatten(-1, (self.width, -1)))  # (M, N, S)
        return self.up(self._with_skip(_own(streams, stream), skip))


class Free(Demultiplexer):
    """Of ``ora`` and ``vanilla``: an MLP from D to N*D."""

    @staticmethod
    def separated_size(width: int, hidden_size: int) -> tuple[int, int]:
        return hidden_size, width * hidden_size

    def separate(self, rows: Tensor, stream: Tensor, skip: Tensor | None) -> Tensor:
        vectors = self.up(self._with_skip(rows, skip)).unflatten(-1, (self.width, -1))
        return _own(vectors, stream)


def _own(streams: Tensor, stream: Tensor) -> Tensor:
    """(M, N, S) and (M,) to (M, S)."""
    return streams[torch.arange(len(stream), device=stream.device), stream]


class AdapterType(NamedTuple):
    """What mixes and what separates."""

    multiplexer: type[Multiplexer]
    demultiplexer: type[Demultiplexer]


ADAPTERS = {
    "revmux": AdapterType(ReversiblyMixed, Inverse),
    "ora": AdapterType(ReversiblyMixed, Free),
    "vanilla": AdapterType(FreelyMixed, Free),
}
