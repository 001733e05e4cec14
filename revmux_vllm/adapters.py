"""Multiplexer and demultiplexer: trained and served by these very classes.

A composite row is made from one row of each member and carries D/N channels of each. Only rows
come in and only rows go out: which rows belong together is the plan's matter, so the same code
runs on a padded batch in training and on vLLM's flat batch in the engine.

Beyond the paper (docs/architecture.md has the reasons): one down-projection per stream instead of
a shared one, normalised rows before it and a learned scale after it, and a skip connection from
what the prefill layers already know of a member into its own output.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.coupling import ReversibleCoupling


class RevMuxAdapter(nn.Module):
    """Adapter of one width: N sequences in, one composite, N vectors out (paper section 3).

    Args:
        width: streams N; must divide ``hidden_size``.
        hidden_size: D of the backbone.
        adapter_hidden_size: width of the up-projection's inner layers.

    Attributes:
        skip_dropout: share of members that go without their skip while training. With it always
            there, wide composites come to be ignored.
    """

    skip_dropout = 0.0

    def __init__(self, width: int, hidden_size: int, adapter_hidden_size: int) -> None:
        super().__init__()
        if hidden_size % width:
            raise ValueError(f"width {width} does not divide hidden_size {hidden_size}")
        self.width = width
        stream_size = hidden_size // width
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        # In float32: there is no orthogonalisation in half precision.
        down = torch.empty(width, hidden_size, stream_size, dtype=torch.float32)  # (N, D, S)
        for weight in down.unbind():
            nn.init.orthogonal_(weight)
        self.down = nn.Parameter(down.to(torch.get_default_dtype()))
        self.coupling = ReversibleCoupling(width, stream_size)
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.skip_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.up = nn.Sequential(
            nn.Linear(stream_size + 2 * hidden_size, adapter_hidden_size),
            nn.ReLU(),
            nn.Linear(adapter_hidden_size, adapter_hidden_size),
            nn.ReLU(),
            nn.Linear(adapter_hidden_size, hidden_size),
        )

    def down_project(self, rows: Tensor, present: Tensor) -> Tensor:
        """Streams of R composite rows before they are mixed.

        Args:
            rows: (R, N, D), row r of every member.
            present: (R, N) bool; False where a member has already ended. Its stream is zero there.

        Returns:
            (R, N, S)
        """
        streams = torch.einsum("rnd,nds->rns", self.norm(rows), self.down)
        return streams * present.unsqueeze(-1)

    def multiplex(self, rows: Tensor, present: Tensor) -> Tensor:
        """R composite rows (R, D) from rows (R, N, D) of the members; see ``down_project``."""
        return self.mix(self.down_project(rows, present))

    def mix(self, streams: Tensor) -> Tensor:
        """Couple streams (R, N, S) into composite rows (R, D)."""
        return self.coupling(streams).flatten(-2) * self.scale

    def demultiplex(self, rows: Tensor, stream: Tensor, skip: Tensor) -> Tensor:
        """Separate M members from the composite rows they are read at.

        Args:
            rows: (M, D), the upper layers' output at each member's pooled position.
            stream: (M,) int64, which stream of its composite a member is.
            skip: (M, 2, D), the member's own state after the prefill layers: at its pooled
                position, and the mean over its tokens.

        Returns:
            (M, D), what the backbone's head reads in place of its own pooled vector.
        """
        streams = self.coupling.inverse(rows.unflatten(-1, (self.width, -1)))  # (M, N, S)
        own = streams[torch.arange(len(stream), device=stream.device), stream]  # (M, S)
        skip = self.skip_norm(skip).flatten(-2)  # (M, 2D)
        if self.training and self.skip_dropout:
            skip = skip * (torch.rand(len(skip), 1, device=skip.device) >= self.skip_dropout)
        return self.up(torch.cat([own, skip], dim=-1))


class AdapterLadder(nn.Module):
    """Adapters for several widths over one backbone. Keys of the state dict: ``{N}.{...}``."""

    def __init__(self, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        for width in config.widths:
            adapter = RevMuxAdapter(width, hidden_size, config.adapter_hidden_size)
            self.add_module(str(width), adapter)

    def __getitem__(self, width: int) -> RevMuxAdapter:
        """The adapter of one width; KeyError names the widths there are."""
        if width not in self.config.widths:
            raise KeyError(f"no adapter of width {width}; there are {list(self.config.widths)}")
        adapter = self.get_submodule(str(width))
        assert isinstance(adapter, RevMuxAdapter)
        return adapter

    def items(self) -> Iterable[tuple[int, RevMuxAdapter]]:
        """(width, adapter), ascending."""
        return [(width, self[width]) for width in self.config.widths]
