"""Neighbouring tokens of one sequence become one row, so that the upper layers run on fewer.

The second multiplexer: no partner is needed, so nothing passes between requests and nothing waits.
Related: ToMe (Bolya et al., 2023), Funnel-Transformer (Dai et al., 2020), PoWER-BERT (Goyal et al.,
2020). Those train or fine-tune the backbone, or merge by similarity; here it is frozen, and groups
are fixed by position, which is all a plan needs to know.
"""

import torch
from torch import Tensor, nn

from revmux_vllm.adapters.reading import correction
from revmux_vllm.rungs import Ends, row_counts


def merged_tokens(lengths: Tensor, factor: int, ends: Ends) -> tuple[Tensor, Tensor]:
    """Which tokens each merged row stands for.

    The tokens that ``ends`` keeps have rows of their own; the others form groups of ``factor``
    neighbours, in order, the last group with what is left.

    Args:
        lengths: (B,) int64, tokens of each sequence.
        factor: M, at least 2.
        ends: which tokens are kept.

    Returns:
        Token indices (B, R, M), -1 where there is none, and rows (B,) of each sequence.
    """
    num_rows = row_counts(lengths, factor, ends)  # (B,)
    row = torch.arange(int(num_rows.max()), device=lengths.device)
    slot = torch.arange(factor, device=lengths.device)
    first, last = ends.kept
    start = (row - first) * factor + first  # (R,) below zero in front of the first group
    tokens = (start[:, None] + slot).expand(len(lengths), -1, -1)
    end = lengths - last
    tokens = tokens.where((tokens < end[:, None, None]) & (row >= first)[:, None], -1)
    if first:
        tokens[:, 0, 0] = 0
    if last:
        tokens[torch.arange(len(lengths)), num_rows - 1, 0] = lengths - 1
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
        self.correction = correction(factor * hidden_size, inner_size, hidden_size)

    def forward(self, rows: Tensor, present: Tensor) -> Tensor:
        """Rows (R, M, D), of which ``present`` (R, M) bool are there, to (R, D).

        At least one must be there, the first of them in the first slot.
        """
        normed = self.norm(rows) * present.unsqueeze(-1)
        score = self.score(normed).squeeze(-1).masked_fill(~present, -torch.inf)
        mean = (score.softmax(-1).unsqueeze(-1) * rows).sum(1)
        merged = mean + self.correction(normed.flatten(1))
        return merged.where(present[:, 1:2], rows[:, 0])
