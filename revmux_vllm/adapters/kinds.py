"""One class for each kind of rung, with the same three verbs, and the ladder that holds them.

Below the cut stand a batch's rows. ``merge`` makes one row of neighbouring ones, ``multiplex`` one
of several members', and behind the upper layers ``read`` makes the vector that the backbone's head
reads. A kind overrides the verbs that it has something to do in.

A new kind is a class here, an entry of ``KINDS``, and what ``rungs.py`` says.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from revmux_vllm import rungs
from revmux_vllm.adapters.exits import ExitHead
from revmux_vllm.adapters.merging import Refiner, TokenMerge
from revmux_vllm.adapters.mux import ADAPTERS, Adapter
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung


class RungAdapter(nn.Module, ABC):
    """What a rung does before the upper layers and after them.

    Args:
        rung: which.
        config: of the ladder.
        hidden_size: D of the backbone.

    Attributes:
        runs_upper_layers: otherwise ``read`` answers from the skip state alone.
        read_without_skip: training asks for answers with the skip state and without it; with it
            always there composites come to be ignored.
    """

    runs_upper_layers: ClassVar[bool] = True
    read_without_skip: ClassVar[bool] = False

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__()
        self.rung = rung

    def merge(self, rows: Tensor, present: Tensor) -> Tensor:
        """Rows (P, M, D), of which ``present`` (P, M) bool are there, to (P, D).

        Those that are there stand in the first slots, in order, and at least one is.
        """
        return rows[:, 0]

    def multiplex(self, rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor | None]:
        """Upper rows from the rows of their members.

        Args:
            rows: (R, N, D), row r of every member.
            present: (R, N) bool; False where a member has already ended.

        Returns:
            Upper rows (R, D); and the streams (R, N, S) before they were mixed, or None where
            nothing is mixed.
        """
        return rows[:, 0], None

    @abstractmethod
    def read(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        """The vectors (M, D) of M members, which the backbone's head reads.

        Args:
            rows: (M, D), the upper layers' output where each member is read; None where none ran.
            stream: (M,) int64, which stream of its composite a member is.
            skip: (M, 2, D), what the prefill layers know of each member: its pooled row, and the
                mean over its tokens. None: answer without it.
        """


class Composite(RungAdapter):
    """``mux:N``: N sequences share rows."""

    read_without_skip = True

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__(rung, config, hidden_size)
        make = ADAPTERS[config.adapter_type]
        self.mux: Adapter = make(rung.mux, hidden_size, config.adapter_hidden_size, config.skip)

    def multiplex(self, rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor | None]:
        streams = self.mux.down_project(rows, present)
        return self.mux.mix(streams), streams

    def read(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        assert rows is not None
        return self.mux.demultiplex(rows, stream, skip)


class Merged(RungAdapter):
    """``merge:N``: N neighbouring tokens of a sequence are a row."""

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__(rung, config, hidden_size)
        self.merger = TokenMerge(rung.merge, hidden_size, config.adapter_hidden_size)
        self.refiner = Refiner(hidden_size, config.adapter_hidden_size, config.skip)

    def merge(self, rows: Tensor, present: Tensor) -> Tensor:
        return self.merger(rows, present)

    def read(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        assert rows is not None
        assert skip is not None
        return self.refiner(rows, skip)


class MergedComposite(Composite):
    """``merge:M+mux:N``: N sequences whose tokens were merged share rows."""

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        merger = TokenMerge(rung.merge, hidden_size, config.adapter_hidden_size)
        super().__init__(rung, config, hidden_size)
        self.merger = merger

    def merge(self, rows: Tensor, present: Tensor) -> Tensor:
        return self.merger(rows, present)


class Exit(RungAdapter):
    """``exit``: the prefill state answers."""

    runs_upper_layers = False

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__(rung, config, hidden_size)
        self.exit = ExitHead(hidden_size, config.adapter_hidden_size, hidden_size)

    def read(self, rows: Tensor | None, stream: Tensor, skip: Tensor | None) -> Tensor:
        assert skip is not None
        return self.exit(skip)


KINDS: dict[rungs.Kind, type[RungAdapter]] = {
    rungs.COMPOSITE: Composite,
    rungs.MERGED: Merged,
    rungs.MERGED_COMPOSITE: MergedComposite,
    rungs.EXIT: Exit,
}


class AdapterLadder(nn.Module):
    """Adapters of several rungs over one backbone. Keys of the state dict: ``{rung}.{...}``."""

    def __init__(self, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        for rung in config.rungs:
            self.add_module(str(rung), KINDS[rung.kind](rung, config, hidden_size))

    def __getitem__(self, rung: Rung) -> RungAdapter:
        """The adapter of one rung; KeyError names those there are."""
        if rung not in self.config.rungs:
            known = ", ".join(map(str, self.config.rungs))
            raise KeyError(f"no adapter for rung {rung}; there are {known}")
        adapter = self.get_submodule(str(rung))
        assert isinstance(adapter, RungAdapter)
        return adapter

    def items(self) -> Iterable[tuple[Rung, RungAdapter]]:
        """(rung, adapter), in the order of the config."""
        return [(rung, self[rung]) for rung in self.config.rungs]
