"""Speed-up in arithmetic: the layer limit with everything else counted, adapters and heads too.

Attention counts as the engine's kernels compute it: of a causal layer half of all pairs of rows, of
a windowed one those within the window. The padded reference, which is what runs here, computes them
all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from revmux_vllm.adapters.kinds import AdapterLadder, RungAdapter
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.backbones.loading import attention_windows
from revmux_vllm.planning.costs import num_pairs, reaches
from revmux_vllm.reference import run_rung
from revmux_vllm.rungs import Rung, row_counts


class Costs:
    """Floating-point operations per sequence, counted by running each part once.

    Args:
        backbone: cut where the checkpoint cuts it.
        num_tokens: tokens per sequence; the mean of the texts in question.
    """

    def __init__(self, backbone: Backbone, num_tokens: int) -> None:
        self.backbone, self.num_tokens = backbone, num_tokens
        self.windows = attention_windows(backbone.config)
        device = next(backbone.layers[0].parameters()).device
        self.lengths = torch.full((1,), num_tokens, device=device)
        self.ids = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
        self.hidden = torch.zeros(1, num_tokens, backbone.hidden_size, device=device)
        layers = backbone.prefill_layers
        lower, pairs = _counted(lambda: backbone.lower(self.ids, self.lengths))
        self.per_pair = pairs / (layers * num_tokens**2)
        self.lower = lower - self._unseen(num_tokens, 0, layers)
        upper = _flops(lambda: backbone.upper(self.hidden, self.lengths))
        self.upper = upper - self._unseen(num_tokens, layers, backbone.num_layers)

    def speedup(self, ladder: AdapterLadder, rung: Rung) -> float:
        """Of ``rung``, against the backbone."""
        hidden = self.hidden[None].expand(1, rung.mux, -1, -1)  # (1, N, T, D)
        lengths = self.lengths[None].expand(1, rung.mux)
        above: float = _flops(lambda: run_rung(self.backbone, ladder[rung], hidden, lengths))
        if not rung.exit:
            rows = row_counts(self.num_tokens, rung.shortening, self.backbone.ends)
            last = rung.stop or self.backbone.num_layers
            above -= self._unseen(rows, self.backbone.prefill_layers, last)
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

    def _unseen(self, rows: int, first: int, last: int) -> float:
        """Of the reference's attention in some layers, over one sequence of ``rows``, what the
        engine leaves out."""
        seen = num_pairs([(rows, rows)], reaches(self.windows[first:last]))
        if self.backbone.is_causal:
            seen /= 2
        return self.per_pair * ((last - first) * rows**2 - seen)

    def _until(self, layer: int) -> float:
        return self.lower * layer / self.backbone.prefill_layers

    def _of_exit(self, head: Any) -> int:
        return _flops(lambda: head(self.hidden[:, :1].expand(1, 2, -1)))


def _flops(run: Callable[[], Any]) -> int:
    return _counted(run)[0]


@torch.no_grad()
def _counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Operations, and of these the ones of batched products: of a backbone, attention's."""
    # The other kernels of attention are not counted by torch on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    batched = counter.get_flop_counts().get("Global", {}).get(torch.ops.aten.bmm, 0)
    return int(counter.get_total_flops()), int(batched)
