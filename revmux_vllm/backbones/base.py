"""The contract of a frozen classifier that is cut after its prefill layers."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revmux_vllm.families import family_of
from revmux_vllm.problems import problem_of

MIN_LENGTH_RATIO = 0.8  # of a batch's longest sequence; what is shorter waits for the next batch


class Backbone(nn.Module, ABC):
    """Lower layers, upper layers and head of a transformers classifier.

    The parts share the model's own modules; nothing is copied and nothing can train. All batches
    are right-padded.

    Args:
        model: the classifier. Set to eval mode and frozen here.
        prefill_layers: layers (l) that belong to the lower part.
        head: maps pooled vectors (M, D) to logits (M, C), or (M, 1) of a cross-encoder.

    Attributes:
        config: the model's own config.
        layers: the layers between which it can be cut, first to last.
        ends: which rows of a sequence are not like the others.
        problem: what its answers mean.
        is_causal: the states of a token do not depend on what comes behind it, so those of a prefix
            can be computed once for all sequences that begin with it.
    """

    layers: list[nn.Module]
    is_causal: ClassVar[bool] = False

    def __init__(self, model: Any, prefill_layers: int, head: nn.Module | None) -> None:
        super().__init__()
        model.requires_grad_(False).eval()
        self.config = model.config
        self.ends = family_of(model.config.model_type).ends
        assert head is not None
        self.prefill_layers = prefill_layers
        self.classifier = head
        self.problem = problem_of(model.config, isinstance(head, LabelWords))

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a frozen backbone has no dropout."""
        return super().train(False)

    @property
    def hidden_size(self) -> int:
        """Channels D of every row."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Layers L that can be cut."""
        return len(self.layers)

    @abstractmethod
    def lower(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        token_type_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Token ids (B, T) of sequences of ``lengths`` (B,) to prefill states (B, T, D).

        ``cache``: see ``between``.
        """

    def upper(self, rows: Tensor, lengths: Tensor, cache: Any = None) -> Tensor:
        """Prefill states of sequences or composites to final states: ``between``, ``finish``."""
        last = self.num_layers
        states = self.between(rows, lengths, None, self.prefill_layers, last, cache)
        return self.finish(states, lengths)

    def prefix_cache(self, first: int) -> Any:
        """An empty ``cache`` for some layers, the first of which is ``first``."""
        raise NotImplementedError("only what is causal keeps prefixes")

    @property
    def dtype(self) -> torch.dtype:
        """What its layers compute in. Rows of another come back as they came."""
        return next(self.layers[0].parameters()).dtype

    def between(
        self,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor | None,
        first: int,
        last: int,
        cache: Any = None,
    ) -> Tensor:
        """Hidden states (G, T, D), of sequences or composites, through some of the layers.

        Args:
            rows: states before layer ``first``.
            lengths: (G,) of the sequences.
            positions: (G, T) of rows that are merged tokens; only a backbone whose every layer
                knows absolute positions reads them. None: 0 to T - 1.
            first, last: layers, from 0, ``last`` not among them.
            cache: of ``prefix_cache``, where sequences begin alike. The first pass, over the prefix
                as one sequence, fills it; rows of all later ones stand behind these, and
                ``lengths`` and ``positions`` count these too.
        """
        passed = self._between(rows.to(self.dtype), lengths, positions, first, last, cache)
        return passed.to(rows.dtype)

    @abstractmethod
    def _between(
        self,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor | None,
        first: int,
        last: int,
        cache: Any,
    ) -> Tensor:
        """``between`` in the dtype of the layers."""

    def finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        """States (G, T, D) after the last layer to final states (G, T', D).

        T' is T, or 1 where one row speaks for all.
        """
        return self._finish(states.to(self.dtype), lengths).to(states.dtype)

    def _finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        """``finish`` in the dtype of the layers."""
        return states

    def pooled_position(self, lengths: Tensor) -> Tensor:
        """Which row of the prefill states speaks for a sequence: (B,) to (B,)."""
        return lengths * 0 if self.ends.pools_first else lengths - 1

    def output_position(self, lengths: Tensor) -> Tensor:
        """Which row of ``upper``'s result its answer is read at: (B,) to (B,)."""
        return self.pooled_position(lengths)

    def head(self, pooled: Tensor) -> Tensor:
        """Pooled vectors (M, D) to answers (M, ...), see ``Problem``."""
        return self.problem.answers(self.classifier(pooled.to(self.dtype)).to(pooled.dtype))


class LabelWords(nn.Module):
    """The head of a verbalizer classifier: the LM head's rows of one word per class.

    Args:
        weight: (V, D) of the LM head.
        token_ids: token of each class's word, in the order of the labels.
        scale: what the model multiplies its last state by before the LM head (tied T5).
    """

    def __init__(self, weight: Tensor, token_ids: list[int], scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach()[token_ids] * scale, persistent=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """(M, D) to (M, C), the logits of the label words alone."""
        return nn.functional.linear(pooled, self.get_buffer("weight"))


def inside(lengths: Tensor, num_tokens: int) -> Tensor:
    """(B,) to (B, T) bool: where a right-padded sequence has tokens."""
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]


def batches_by_length(lengths: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Indices of sequences to pad together, the longest first, similar lengths in each batch.

    Args:
        lengths: (B,) on the CPU.
        max_tokens: of a batch, padding counted; a longer sequence is a batch of its own.
    """
    order = lengths.argsort(descending=True, stable=True)
    ordered = lengths[order].tolist()
    begin = 0
    for end in range(1, len(ordered) + 1):
        full = end < len(ordered) and (
            (end - begin + 1) * ordered[begin] > max_tokens
            or ordered[end] < MIN_LENGTH_RATIO * ordered[begin] - 4
        )
        if full or end == len(ordered):
            yield order[begin:end]
            begin = end


def shared_copy(module: Any) -> Any:
    """``module`` with its own list of children; the children are the original's."""
    part = copy.copy(module)
    part._modules = dict(module._modules)
    return part
