"""Speed-up in arithmetic: the layer limit with everything else counted, adapters and heads too."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from revmux_vllm.adapters.kinds import AdapterLadder, RungAdapter
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.reference import run_rung
from revmux_vllm.rungs import Rung


class Costs:
    """Floating-point operations per sequence, counted by running each part once.

    Args:
        backbone: cut where the checkpoint cuts it.
        num_tokens: tokens per sequence; the mean of the texts in question.
    """

    def __init__(self, backbone: Backbone, num_tokens: int) -> None:
        self.backbone = backbone
        device = next(backbone.layers[0].parameters()).device
        self.lengths = torch.full((1,), num_tokens, device=device)
        self.ids = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
        self.hidden = torch.zeros(1, num_tokens, backbone.hidden_size, device=device)
        self.lower = _flops(lambda: backbone.lower(self.ids, self.lengths))
        self.upper = _flops(lambda: backbone.upper(self.hidden, self.lengths))

    def speedup(self, ladder: AdapterLadder, rung: Rung) -> float:
        """Of ``rung``, against the backbone."""
        hidden = self.hidden[None].expand(1, rung.mux, -1, -1)  # (1, N, T, D)
        lengths = self.lengths[None].expand(1, rung.mux)
        above = _flops(lambda: run_rung(self.backbone, ladder[rung], hidden, lengths))
        return (self.lower + self.upper) / (self.lower + above / rung.mux)

    def exit_speedup(self, head: Any, layer: int) -> float:
        """Of an early exit after ``layer``, against the backbone."""
        return (self.lower + self.upper) / (self._until(layer) + self._of_exit(head))

    def cascade(self, exits: nn.ModuleDict) -> list[float]:
        """Share of the backbone's cost at each of several early exits, by layer, when those before
        it were asked as well; and last when nobody was sure."""
        whole, asked, shares = self.lower + self.upper, 0.0, []
        for layer, head in exits.items():
            asked += self._of_exit(head)
            shares.append((self._until(int(layer)) + asked) / whole)
        return [*shares, 1 + asked / whole]

    def until_stops(self, stops: Sequence[RungAdapter]) -> list[float]:
        """Share of the backbone's work until each exit of a contract, by depth, the ones before it
        counted, and last of the whole way past all of them."""
        whole, asked, shares = self.lower + self.upper, 0.0, []
        state = self.hidden[:, :1].expand(1, 2, -1)
        stream = self.lengths * 0
        for adapter in stops:
            asked += _flops(
                lambda: self.backbone.head(adapter.read(None, stream, state))  # noqa: B023
            )
            layer = adapter.rung.stop or self.backbone.prefill_layers
            shares.append((self._until(layer) + asked) / whole)
        return [*shares, 1 + asked / whole]

    def _until(self, layer: int) -> float:
        return self.lower * layer / self.backbone.prefill_layers

    def _of_exit(self, head: Any) -> int:
        return _flops(lambda: head(self.hidden[:, :1].expand(1, 2, -1)))


@torch.no_grad()
def _flops(run: Callable[[], Any]) -> int:
    # The other kernels of attention are not counted by torch on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
