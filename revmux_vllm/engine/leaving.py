"""Sequences under an accuracy contract leave a step between two parts of the upper layers.

Those that go on are packed tighter, so every part runs on fewer rows than the one before it. Index
arithmetic, and the one look at the device that each stop costs; the layers are the model's.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from revmux_vllm.adapters.trust import trust
from revmux_vllm.engine.layout import A, MuxLayout
from revmux_vllm.engine.prefixes import narrower
from revmux_vllm.engine.transfer import sent
from revmux_vllm.planning.contract import Contract
from revmux_vllm.planning.watching import TRUST_EDGES, TRUST_NAMES
from revmux_vllm.problems import Problem
from revmux_vllm.rungs import Ends, Rung

NOWHERE, NO_SHADOW = -1, -2


@dataclass(frozen=True)
class Kept(Generic[A]):
    """What goes on of a layout.

    Attributes:
        rows: (U',) upper rows.
        groups: (G',) sequences.
        starts: (G' + 1,) int32, as ``MuxLayout.starts``.
        read_at: (M',) row, among those that go on, at which each sequence under the contract is
            read.
        stay, leave: (M',) and (L,) which of the sequences under the contract do.
        host_starts, host_groups: ``starts`` and ``groups`` as arrays.
    """

    rows: A
    groups: A
    starts: A
    read_at: A
    stay: A
    leave: A
    host_starts: np.ndarray = field(metadata={"host": True})
    host_groups: np.ndarray = field(metadata={"host": True})


def keep(starts: np.ndarray, leaves: np.ndarray, ends: Ends) -> Kept[np.ndarray]:
    """What goes on where some sequences leave.

    Args:
        starts: (G + 1,) first upper row of every sequence, and the number of rows. The sequences
            under the contract are the last ones.
        leaves: (M,) bool, of these.
        ends: which token speaks for a sequence.
    """
    num_alone = len(starts) - 1 - len(leaves)
    stays = np.concatenate([np.ones(num_alone, bool), ~leaves])
    groups = np.flatnonzero(stays)
    lengths = np.diff(starts)
    rows = np.flatnonzero(np.repeat(stays, lengths))
    kept = np.concatenate([[0], np.cumsum(lengths[groups])]).astype(np.int32)
    speaks = kept[:-1] if ends.pools_first else kept[1:] - 1
    read_at = speaks[num_alone:].astype(np.int64)
    stay, leave = np.flatnonzero(~leaves), np.flatnonzero(leaves)
    return Kept(rows, groups, kept, read_at, stay, leave, kept, groups)


def narrowed(layout: MuxLayout[Tensor], kept: Kept[Tensor]) -> MuxLayout[Tensor]:
    """The layout of what goes on, as attention metadata want it; its ``rungs`` are the step's."""
    return replace(
        layout,
        positions=layout.positions[kept.rows],
        places=layout.places[kept.rows],
        carriers=layout.carriers[kept.groups],
        carrier_rows=layout.carrier_rows[kept.rows],
        starts=kept.starts,
        lengths=layout.lengths[kept.groups],
        paging=None if layout.paging is None else narrower(layout.paging, kept.groups, kept.rows),
        host_starts=kept.host_starts,
        host_lengths=layout.host_lengths[kept.host_groups],
        host_stops=layout.host_stops[kept.host_groups],
    )


class Leaving:
    """The sequences of one step that are under a contract, from stop to stop.

    Args:
        contract: which.
        model: whose exits and head answer; see ``RevMuxForSequenceClassification``.
        layout: of the step: sequences alone, and those under the contract behind them.
        skip: (B, 2, D), see ``skip_state``.
        like: rows (U, D), for the dtype of the vectors.
        chosen: (M,) bool, shadows: they go to the end all the same, and are compared there.

    Attributes:
        layout: of what goes on.
        vectors: (M, D) of those that have left.
        left: how many left where.
        shadows, trusts: see ``StepTimes``.
    """

    def __init__(
        self,
        contract: Contract,
        model: Any,
        layout: MuxLayout[Tensor],
        skip: Tensor,
        like: Tensor,
        chosen: np.ndarray,
    ) -> None:
        (part,) = layout.rungs
        self.contract, self.model, self.layout = contract, model, layout
        self.whole, self.num_sequences = layout.paging, len(part.sequence)
        self.prefixes = None if layout.paging is None else model.prefixes
        self.places = {
            stop.stop or model.bounds[0]: place for place, stop in enumerate(contract.stops)
        }
        assert part.read_at is not None
        self.read_at = part.read_at
        self.going = torch.arange(len(part.sequence), device=like.device)
        self.skip = skip[part.sequence]
        self.said: list[Tensor] = []  # (M', C) at every stop so far
        self.vectors = like.new_zeros(len(self.going), like.shape[-1])
        self.left: dict[str, int] = {}
        self.shadows: dict[tuple[str, str], int] = {}
        self.trusts: dict[str, list[int]] = {}
        # (M',) the stop where each shadow would have left: NOWHERE yet, or it is no shadow; and its
        # class there.
        is_shadow = torch.from_numpy(chosen).to(like.device)
        self.would_leave = torch.where(is_shadow, NOWHERE, NO_SHADOW)
        self.would_say = torch.full_like(self.would_leave, NOWHERE)
        self.has_shadows = bool(chosen.any())

    def at(self, layer: int, rows: Tensor) -> Tensor:
        """Let those go that are sure enough after ``layer``; the rows (U', D) of the others."""
        place = self.places.get(layer)
        if place is None or not len(self.going):
            return rows
        stop, least = self.contract.stops[place], self.contract.thresholds[place]
        state = self.skip
        if not stop.exit:
            first_group = len(self.layout.host_starts) - 1 - len(self.going)
            before = None
            if self.prefixes is not None:
                before = self.prefixes.before_rows(layer, self.whole)[-self.num_sequences :]
                before = before[self.going]
            state = self.layout.state(rows, self.read_at, first_group, self.skip.dtype, before)
        vectors = self.model.adapters[stop].read(None, self.going * 0, state)
        logits = Problem.ONE_CLASS.answers(self.model.answer(vectors)).float()
        self.said.append(logits)
        if least is None:
            return rows
        weights, bias = self.model.trusts[place]
        trusts = trust(torch.stack(self.said, dim=1), weights, bias)
        group = get_tp_group()
        if group.world_size > 1:  # ranks that differed in one would wait for one another for ever
            trusts = group.broadcast(trusts, src=0)
        sure = trusts >= least
        if self.has_shadows:
            now = sure & (self.would_leave == NOWHERE)
            self.would_leave = torch.where(now, place, self.would_leave)
            self.would_say = torch.where(now, logits.argmax(-1), self.would_say)
            sure = sure & (self.would_leave == NO_SHADOW)
        seen = torch.stack([trusts, sure.to(trusts.dtype)]).cpu().numpy()  # the one look
        places = np.searchsorted(TRUST_EDGES, seen[0], side="right")
        self.trusts[str(stop)] = np.bincount(places, minlength=len(TRUST_NAMES)).tolist()
        return self._let_go(stop, seen[1] > 0, vectors.to(self.vectors.dtype), rows)

    def _let_go(self, stop: Rung, leaves: np.ndarray, vectors: Tensor, rows: Tensor) -> Tensor:
        if not leaves.any():
            return rows
        self.left[str(stop)] = int(leaves.sum())
        made = keep(self.layout.host_starts, leaves, self.model.ends)
        kept: Kept[Tensor] = sent(made, rows.device)
        self.vectors[self.going[kept.leave]] = vectors[kept.leave]
        self.layout, self.read_at = narrowed(self.layout, kept), kept.read_at
        self.going = self.going[kept.stay]
        self.would_leave = self.would_leave[kept.stay]
        self.would_say = self.would_say[kept.stay]
        self.said = [logits[kept.stay] for logits in self.said]
        return rows[kept.rows]

    def end(self, rows: Tensor) -> Tensor:
        """Those that were never sure are read off the final states; the rows of those alone."""
        if len(self.going):
            self.left[str(Rung())] = len(self.going)
            self.vectors[self.going] = rows[self.read_at]
            if self.has_shadows:
                self._compare_shadows(rows[self.read_at])
        return rows[: len(self.layout.alone)]

    def _compare_shadows(self, finals: Tensor) -> None:
        """What those who stayed as a sample would have said, and what they say now."""
        said = Problem.ONE_CLASS.answers(self.model.answer(finals)).argmax(-1)
        table = torch.stack([self.would_leave, (said == self.would_say).long()]).cpu()
        for place, same in table.T.tolist():
            if place >= 0:
                key = str(self.contract.stops[place]), "same" if same else "other"
                self.shadows[key] = self.shadows.get(key, 0) + 1
