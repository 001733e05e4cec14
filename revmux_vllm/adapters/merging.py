"""Neighbouring tokens of one sequence become one row, so that the upper layers run on fewer.

The second multiplexer: no partner is needed, so nothing passes between requests and nothing waits.
Related: ToMe (Bolya et al., 2023), Funnel-Transformer (Dai et al., 2020), PoWER-BERT (Goyal et al.,
2020). Those train or fine-tune the backbone, or merge by similarity; here it is frozen, and groups
are fixed by position, which is all a plan needs to know.
"""

import torch
from torch import Tensor, nn

from revmux_vllm.rungs import row_counts


def merged_tokens(lengths: Tensor, factor: int, pools_first: bool) -> tuple[Tensor, Tensor]:
    """Which tokens each merged row stands for.

    The pooled token keeps a row of its own; the others form groups of ``factor`` neighbours, in
    order, the last group with what is left.

    Args:
        lengths: (B,) int64, tokens of each sequence.
        factor: M, at least 2.
        pools_first: the pooled token is the first one, as in an encoder; else it is the last.

    Returns:
        Token indices (B, R, M), -1 where there is none, and rows (B,) of each sequence.
    """
    num_rows = row_counts(lengths, factor)  # (B,)
    row = torch.arange(int(num_rows.max()), device=lengths.device)
    slot = torch.arange(factor, device=lengths.device)
    start = (row - 1) * factor + 1 if pools_first else row * factor  # (R,)
    tokens = (start[:, None] + slot).expand(len(lengths), -1, -1)
    end = lengths if pools_first else lengths - 1
    tokens = tokens.where((tokens < end[:, None, None]) & (start >= 0)[:, None], -1)
    kept = lengths * 0 if pools_first else num_rows - 1  # (B,) row
    token = lengths * 0 if pools_first else lengths - 1
    tokens[torch.arange(len(lengths)), kept, 0] = token
    return tokens, num_rows


class TokenMerge(nn.Module):
    """M neighbouring rows to one of the same size: their weighted mean, and a correction to it.

    Untrained it is the mean. A row without neighbours stays as it is.

    Args:
        factor: M.
        hidden_size: D of the backbone.
        inner_size: width of the correction's inner layer.
    """

    def __init__(self, factor: int, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.factor = factor
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.score = nn.Linear(hidden_size, 1, bias=False)  # a softmax does not see a bias
        nn.init.zeros_(self.score.weight)
        self.correction = _correction(factor * hidden_size, inner_size, hidden_size)

    def forward(self, rows: Tensor, present: Tensor) -> Tensor:
        """Rows (R, M, D), of which ``present`` (R, M) bool are there, to (R, D).

        At least one must be there, the first of them in the first slot.
        """
        normed = self.norm(rows) * present.unsqueeze(-1)
        score = self.score(normed).squeeze(-1).masked_fill(~present, -torch.inf)
        mean = (score.softmax(-1).unsqueeze(-1) * rows).sum(1)
        merged = mean + self.correction(normed.flatten(1))
        return merged.where(present[:, 1:2], rows[:, 0])


class Refiner(nn.Module):
    """Corrects the vector that the head reads, knowing the prefill state.

    Untrained it corrects nothing.

    Args:
        hidden_size: D of the backbone.
        inner_size: width of the inner layer.
        skip: read the prefill state.
    """

    def __init__(self, hidden_size: int, inner_size: int, skip: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.skip_norm = nn.RMSNorm(hidden_size, eps=1e-6) if skip else None
        self.correction = _correction((1 + 2 * skip) * hidden_size, inner_size, hidden_size)

    def forward(self, rows: Tensor, skip: Tensor) -> Tensor:
        """Vectors (M, D) and prefill states (M, 2, D), as ``skip_state`` makes them, to (M, D)."""
        known = [self.norm(rows)]
        if self.skip_norm is not None:
            known.append(self.skip_norm(skip).flatten(1))
        return rows + self.correction(torch.cat(known, dim=-1))


def _correction(in_size: int, inner_size: int, out_size: int) -> nn.Sequential:
    last = nn.Linear(inner_size, out_size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(in_size, inner_size), nn.ReLU(), last)
