"""Multiplexer and demultiplexer of one width.

A composite row is made from one row of each member. Only rows come in and only rows go out: which
rows belong together is the plan's matter, so the same code runs on a padded batch in training and
on vLLM's flat batch in the engine.

Three types, as the paper compares them (section 4; table 2 there): ``revmux`` mixes reversibly and
separates by the inverse, ``ora`` mixes reversibly and separates freely, ``vanilla`` does both
freely. Beyond the paper (docs/architecture.md has the reasons): one down-projection per stream,
normalised rows before it and a learned scale after it, and a skip connection from what the prefill
layers already know of a member into its own output.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from revmux_vllm.adapters.coupling import ReversibleCoupling


class Adapter(nn.Module, ABC):
    """Adapter of one width: N sequences in, one composite, N vectors out.

    Args:
        width: streams N; must divide ``hidden_size``.
        hidden_size: D of the backbone.
        inner_size: width of the demultiplexer's inner layers.
        skip: let a member's own prefill state into its output.
    """

    def __init__(self, width: int, hidden_size: int, inner_size: int, skip: bool = True) -> None:
        super().__init__()
        if hidden_size % width:
            raise ValueError(f"width {width} does not divide hidden_size {hidden_size}")
        self.width = width
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.skip_norm = nn.RMSNorm(hidden_size, eps=1e-6) if skip else None
        in_size, out_size = self.separated_size(hidden_size)
        self.up = nn.Sequential(
            nn.Linear(in_size + 2 * hidden_size * skip, inner_size),
            nn.ReLU(),
            nn.Linear(inner_size, inner_size),
            nn.ReLU(),
            nn.Linear(inner_size, out_size),
        )

    @abstractmethod
    def separated_size(self, hidden_size: int) -> tuple[int, int]:
        """Channels that ``up`` reads of a composite row, and channels that it makes."""

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
    def mix(self, streams: Tensor) -> Tensor:
        """Streams (R, N, S) to composite rows (R, D)."""

    def multiplex(self, rows: Tensor, present: Tensor) -> Tensor:
        """R composite rows (R, D) from rows (R, N, D) of the members; see ``down_project``."""
        return self.mix(self.down_project(rows, present))

    @abstractmethod
    def demultiplex(self, rows: Tensor, stream: Tensor, skip: Tensor | None) -> Tensor:
        """Separate M members from the composite rows they are read at.

        Args:
            rows: (M, D), the upper layers' output where each member is read.
            stream: (M,) int64, which stream of its composite a member is.
            skip: (M, 2, D), the member's own state after the prefill layers: at its pooled
                position, and the mean over its tokens. None: answer from the composite alone.

        Returns:
            (M, D), what the backbone's head reads in place of its own pooled vector.
        """

    def _with_skip(self, separated: Tensor, skip: Tensor | None) -> Tensor:
        if self.skip_norm is None:
            return separated
        if skip is None:
            normed = separated.new_zeros(len(separated), 2 * self.skip_norm.weight.shape[0])
        else:
            normed = self.skip_norm(skip).flatten(-2)  # (M, 2D)
        return torch.cat([separated, normed], dim=-1)


class ReversiblyMixed(Adapter):
    """The multiplexer of ``revmux`` and ``ora``: D to D/N per stream, then the coupling."""

    def __init__(self, width: int, hidden_size: int, inner_size: int, skip: bool = True) -> None:
        super().__init__(width, hidden_size, inner_size, skip)
        stream_size = hidden_size // width
        # In float32: there is no orthogonalisation in half precision.
        down = torch.empty(width, hidden_size, stream_size, dtype=torch.float32)  # (N, D, S)
        for weight in down.unbind():
            nn.init.orthogonal_(weight)
        self.down = nn.Parameter(down.to(torch.get_default_dtype()))
        self.coupling = ReversibleCoupling(width, stream_size)
        self.scale = nn.Parameter(torch.ones(hidden_size))

    def down_project(self, rows: Tensor, present: Tensor) -> Tensor:
        streams = torch.einsum("rnd,nds->rns", self.norm(rows), self.down)
        return streams * present.unsqueeze(-1)

    def mix(self, streams: Tensor) -> Tensor:
        return self.coupling(streams).flatten(-2) * self.scale


class RevMuxAdapter(ReversiblyMixed):
    """Separated by the inverse of the very coupling that mixed (paper section 3)."""

    def separated_size(self, hidden_size: int) -> tuple[int, int]:
        return hidden_size // self.width, hidden_size

    def demultiplex(self, rows: Tensor, stream: Tensor, skip: Tensor | None) -> Tensor:
        streams = self.coupling.inverse(rows.unflatten(-1, (self.width, -1)))  # (M, N, S)
        return self.up(self._with_skip(_own(streams, stream), skip))


class FreelySeparated(Adapter):
    """The demultiplexer of ``ora`` and ``vanilla``: an MLP from D to N*D."""

    def separated_size(self, hidden_size: int) -> tuple[int, int]:
        return hidden_size, self.width * hidden_size

    def demultiplex(self, rows: Tensor, stream: Tensor, skip: Tensor | None) -> Tensor:
        vectors = self.up(self._with_skip(rows, skip)).unflatten(-1, (self.width, -1))
        return _own(vectors, stream)


class OraAdapter(FreelySeparated, ReversiblyMixed):
    """Only the multiplexer is reversible."""


class VanillaAdapter(FreelySeparated):
    """Nothing is reversible: a D to D map per stream, then an MLP from N*D to 3D to D."""

    def __init__(self, width: int, hidden_size: int, inner_size: int, skip: bool = True) -> None:
        super().__init__(width, hidden_size, inner_size, skip)
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

    def mix(self, streams: Tensor) -> Tensor:
        return self.mixer(streams.flatten(-2))


def _own(streams: Tensor, stream: Tensor) -> Tensor:
    """(M, N, S) and (M,) to (M, S)."""
    return streams[torch.arange(len(stream), device=stream.device), stream]


ADAPTERS: dict[str, type[Adapter]] = {
    "revmux": RevMuxAdapter,
    "ora": OraAdapter,
    "vanilla": VanillaAdapter,
}
