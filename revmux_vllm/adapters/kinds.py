"""One class for each kind of rung, and the ladder that holds them.

A rung has two parts. Its *path* changes rows below the cut: ``merge`` makes one row of neighbouring
ones, ``multiplex`` one of several members'. Its *reader* makes, where the rung ends, the vector
that the backbone's head reads. Rungs that differ only in where they stop share a path, in the
checkpoint and in training, where one pass serves them all.

A new kind is a path here, an entry of ``PATHS``, and what ``rungs.py`` says.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revmux_vllm import rungs
from revmux_vllm.adapters.merging import TokenMerge
from revmux_vllm.adapters.mux import ADAPTERS, Multiplexer
from revmux_vllm.adapters.reading import EarlyReader, Reader, Refiner
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung


class Path(nn.Module):
    """What a rung does to rows before the upper layers; this one does nothing.

    Args:
        rung: which.
        config: of the ladder.
        hidden_size: D of the backbone.
    """

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__()

    def merge(self, rows: Tensor, present: Tensor) -> Tensor:
        """Rows (P, M, D), of which ``present`` (P, M) bool are there, to (P, D).

        Those that are there stand in the first slots, in order, and at least one is.
        """
        return rows[:, 0]

    def multiplex(
        self, rows: Tensor, present: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Upper rows from the rows of their members.

        Args:
            rows: (R, N, D), row r of every member.
            present: (R, N) bool; False where a member has already ended.
            sinks: (R,) bool, rows that are attention sinks and pass unmixed; None: there are none.

        Returns:
            Upper rows (R, D); and the streams (R, N, S) before they were mixed, or None where
            nothing is mixed.
        """
        return rows[:, 0], None


class Composite(Path):
    """``mux:N``: N sequences share rows."""

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__(rung, config, hidden_size)
        self.mux: Multiplexer = ADAPTERS[config.adapter_type].multiplexer(rung.mux, hidden_size)

    def multiplex(
        self, rows: Tensor, present: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        streams = self.mux.down_project(rows, present)
        mixed = self.mux.mix(streams)
        if sinks is not None:
            # The first rows of all sequences are nearly the same, so their mean is one of them.
            mixed = torch.where(sinks[:, None], rows.mean(1), mixed)
        return mixed, streams


class Merged(Path):
    """``merge:N``: N neighbouring tokens of a sequence are a row."""

    def __init__(self, rung: Rung, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__(rung, config, hidden_size)
        self.merger = TokenMerge(rung.merge, hidden_size, config.adapter_hidden_size)

    def merge(self, rows: Tensor, present: Tensor) -> Tensor:
        return self.merger(rows, present)


class MergedComposite(Composite, Merged):
    """``merge:M+mux:N``: N sequences whose tokens were merged share rows."""


PATHS: dict[rungs.Kind, type[Path]] = {
    rungs.COMPOSITE: Composite,
    rungs.MERGED: Merged,
    rungs.MERGED_COMPOSITE: MergedComposite,
    rungs.EXIT: Path,
}


def make_reader(rung: Rung, path: Path, config: RevMuxConfig, hidden_size: int) -> Reader:
    """The untrained reader of a rung over its path."""
    inner_size = config.adapter_hidden_size
    if isinstance(path, Composite):
        make = ADAPTERS[config.adapter_type].demultiplexer
        return make(path.mux, hidden_size, inner_size, config.skip)
    if rung.reads_state:
        return EarlyReader(hidden_size, inner_size)
    return Refiner(hidden_size, inner_size, config.skip)


@dataclass(frozen=True)
class RungAdapter:
    """The two parts of a rung."""

    rung: Rung
    path: Path
    read: Reader

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of both parts; what rungs share counts for each."""
        yield from self.path.parameters()
        yield from self.read.parameters()

    @property
    def read_without_skip(self) -> bool:
        """Training asks for answers with the skip state and without it; with it always there
        composites come to be ignored."""
        return self.rung.mux > 1


class AdapterLadder(nn.Module):
    """Adapters of several rungs over one backbone.

    Keys of the state dict: ``paths.{rung without its stop}.{...}`` and ``readers.{rung}.{...}``.
    """

    def __init__(self, config: RevMuxConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.paths, self.readers = nn.ModuleDict(), nn.ModuleDict()
        for rung in config.rungs:
            if str(rung.path) not in self.paths:
                self.paths[str(rung.path)] = PATHS[rung.kind](rung, config, hidden_size)
            self.readers[str(rung)] = make_reader(rung, self._path(rung), config, hidden_size)

    def _path(self, rung: Rung) -> Path:
        path = self.paths[str(rung.path)]
        assert isinstance(path, Path)
        return path

    def __getitem__(self, rung: Rung) -> RungAdapter:
        """The adapter of one rung; KeyError names those there are."""
        if rung not in self.config.rungs:
            known = ", ".join(map(str, self.config.rungs))
            raise KeyError(f"no adapter for rung {rung}; there are {known}")
        reader = self.readers[str(rung)]
        assert isinstance(reader, Reader)
        return RungAdapter(rung, self._path(rung), reader)

    def items(self) -> Iterable[tuple[Rung, RungAdapter]]:
        """(rung, adapter), in the order of the config."""
        return [(rung, self[rung]) for rung in self.config.rungs]

    def by_path(self) -> list[tuple[Path, list[RungAdapter]]]:
        """Every path with the rungs that share it, in the order of the config."""
        found: dict[Rung, list[RungAdapter]] = {}
        for rung, adapter in self.items():
            found.setdefault(rung.path, []).append(adapter)
        return [(adapters[0].path, adapters) for adapters in found.values()]
