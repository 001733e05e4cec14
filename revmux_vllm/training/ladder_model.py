"""What is trained: the losses of every rung, and of the early exits beside them, on one batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from revmux_vllm.adapters.kinds import AdapterLadder, RungAdapter
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.families import family_of
from revmux_vllm.problems import Problem
from revmux_vllm.reference import Passed, run_path
from revmux_vllm.training.losses import (
    answer_loss,
    info_nce,
    random_groups,
    stream_similarity,
    value_loss,
    vector_loss,
)


class LadderModel(nn.Module):
    """What ``Trainer`` trains: the loss of every rung, and of every early exit, on one batch.

    The frozen backbone is used but is not a submodule: it is neither saved nor wrapped.

    Args:
        backbone: cut as ``ladder`` wants it.
        ladder: the adapters.
        exits: one head per layer of ``Features.exits``, in that order, by the layer's number; the
            cut is among them, and every stop of a rung that changes no rows.
        paper_loss: see ``Recipe``.
    """

    def __init__(
        self, backbone: Backbone, ladder: AdapterLadder, exits: nn.ModuleDict, paper_loss: bool
    ) -> None:
        super().__init__()
        self.ladder, self.exits = ladder, exits
        self.paper_loss = paper_loss
        self._frozen = (backbone,)
        self.nce_weight = family_of(backbone.config.model_type).nce_weight

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LadderModel":
        self.backbone._apply(fn)  # type: ignore[no-untyped-call]  # goes where the adapters go
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden: Tensor,
        lengths: Tensor,
        labels: Tensor,
        teacher_vectors: Tensor,
        teacher_logits: Tensor,
        exit_states: Tensor,
        shared: int = 0,
    ) -> dict[str, Tensor]:
        """Losses of a padded batch; all as in ``Features``, ``hidden`` (B, T, D).

        While measuring, early exits are left out: the best checkpoint is the adapters' best.
        """
        losses = {}
        for path, adapters in self.ladder.by_path():
            group = self._groups(lengths, adapters[0].rung.mux)
            rows = group.flatten()
            target = labels[rows], teacher_logits[rows], teacher_vectors[rows]
            if list(path.parameters()):
                passed = run_path(self.backbone, adapters, hidden[group], lengths[group], shared)
            else:
                passed = self._seen(adapters, exit_states[rows])
            for adapter in adapters:
                # A composite that has the skip must answer without it too; see ``Recipe.skip``.
                both = self.training and self.ladder.config.skip and adapter.read_without_skip
                parts = [
                    self._member_loss(passed.read(adapter, with_skip), *target)
                    for with_skip in ((True, False) if both else (True,))
                ]
                losses[f"loss_{adapter.rung}"] = torch.stack(parts).mean()
            if self.paper_loss and passed.streams is not None:
                losses[f"loss_streams_{adapters[0].rung.path}"] = stream_similarity(passed.streams)
        for place, (layer, head) in enumerate(self.exits.items() if self.training else ()):
            given = self.backbone.problem.answers(head(exit_states[:, place]))
            losses[f"loss_exit_{layer}"] = self._answer_loss(given, labels, teacher_logits)
        return {"loss": torch.stack(list(losses.values())).sum()} | losses

    def _seen(self, adapters: Sequence[RungAdapter], exit_states: Tensor) -> Passed:
        """What a path that changes nothing would give: it was seen with the features.

        ``exit_states``: (B, E, 2, D).
        """
        places = {int(layer): place for place, layer in enumerate(self.exits)}
        stops = {adapter.rung.stop for adapter in adapters} - {0}
        return Passed(
            rows={stop: exit_states[:, places[stop]] for stop in stops},
            stream=torch.zeros(len(exit_states), dtype=torch.long, device=exit_states.device),
            skip=exit_states[:, places[self.backbone.prefill_layers]],
            streams=None,
        )

    def _member_loss(
        self, vectors: Tensor, labels: Tensor, teacher_logits: Tensor, teacher_vectors: Tensor
    ) -> Tensor:
        vectors = vectors.flatten(0, 1)  # (G*N, D)
        logits = self.backbone.head(vectors)
        if self.paper_loss:
            own = self._answer_loss(logits, labels, teacher_logits, label_share=1.0)
            return own + self.nce_weight * info_nce(vectors, teacher_vectors)
        own = self._answer_loss(logits, labels, teacher_logits)
        return own + vector_loss(vectors, teacher_vectors)

    @property
    def _answer_loss(self) -> Callable[..., Tensor]:
        return value_loss if self.backbone.problem is Problem.VALUES else answer_loss

    def _groups(self, lengths: Tensor, width: int) -> Tensor:
        """Random in training; while measuring the same every time."""
        with torch.random.fork_rng(enabled=not self.training):
            if not self.training:
                torch.manual_seed(0)
            return random_groups(lengths, width)
