"""The ways through the upper layers for less, by name: ``mux:N``, ``merge:N``, both, ``exit``.

A new kind of rung is a row of ``GRAMMAR``, a field of ``Rung`` where its name has a number of its
own (with its part in ``COUNTS``, ``shortening`` and ``way``), and a class in ``adapters/kinds.py``.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from revmux_vllm.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A row of the grammar.

    Attributes:
        name: of the kind.
        form: as messages show it.
        says: what the upper layers run on, for help and model cards.
        pattern: of a whole name; its groups are fields of ``Rung``.
    """

    name: str
    form: str
    says: str
    pattern: re.Pattern[str]


ALONE = Kind("alone", "alone", "every token of one sequence", re.compile("alone"))
EXIT = Kind(
    "exit", "exit", "nothing: an answer from the prefill layers alone", re.compile("(?P<exit>exit)")
)
COMPOSITE = Kind("composite", "mux:N", "composites of N sequences", re.compile(r"mux:(?P<mux>\d+)"))
MERGED = Kind(
    "merged", "merge:N", "one row per N neighbouring tokens", re.compile(r"merge:(?P<merge>\d+)")
)
MERGED_COMPOSITE = Kind(
    "merged composite",
    "merge:N+mux:N",
    "composites of N sequences whose tokens were merged",
    re.compile(r"merge:(?P<merge>\d+)\+mux:(?P<mux>\d+)"),
)
GRAMMAR = (ALONE, EXIT, COMPOSITE, MERGED, MERGED_COMPOSITE)
COUNTS = ("merge", "mux")
"""Fields of ``Rung`` that say how many become one row, in the order of a name."""
_READ = {"exit": bool} | dict.fromkeys(COUNTS, int)


@dataclass(frozen=True, order=True)
class Rung:
    """What the upper layers run on; ``Rung()`` is a sequence alone, the backbone itself.

    Attributes:
        merge: neighbouring tokens of one sequence that become one row; 1 merges none.
        mux: sequences that share a composite (the width N); 1 is no composite.
        exit: no upper layer at all; the answer is read off the prefill state.
    """

    merge: int = 1
    mux: int = 1
    exit: bool = False

    def __post_init__(self) -> None:
        counts = self.merge, self.mux
        if min(counts) < 1 or (self.exit and max(counts) > 1):
            raise ValueError(f"no such rung: {dict(self._counts())}, exit {self.exit}")

    def __str__(self) -> str:
        if self.exit:
            return "exit"
        return "+".join(f"{name}:{n}" for name, n in self._counts() if n > 1) or "alone"

    def _counts(self) -> list[tuple[str, int]]:
        return [(name, getattr(self, name)) for name in COUNTS]

    @property
    def kind(self) -> Kind:
        """The row of the grammar that it is written by."""
        for kind in GRAMMAR:
            if kind.pattern.fullmatch(str(self)):
                return kind
        raise ValueError(f"no row of the grammar writes {self}")

    @property
    def saving(self) -> float:
        """Rows of the backbone that one row of this rung stands for; without end for ``exit``."""
        return math.inf if self.exit else self.shortening * self.mux

    @property
    def shortening(self) -> int:
        """Neighbouring tokens of one sequence that become one row; 1: as many rows as tokens."""
        return self.merge

    @property
    def way(self) -> tuple[int, bool]:
        """What is done to each sequence by itself: every field but ``mux``."""
        return self.merge, self.exit

    @classmethod
    def parse(cls, text: str) -> "Rung":
        """``merge:2+mux:4`` and the like: what ``str`` gives.

        Raises:
            UserError: naming the text and what was expected.
        """
        for kind in GRAMMAR if isinstance(text, str) else ():
            if found := kind.pattern.fullmatch(text):
                fields: dict[str, Any] = {k: _READ[k](v) for k, v in found.groupdict().items()}
                if min(fields.values(), default=1) and str(rung := cls(**fields)) == text:
                    return rung
        *others, last = (kind.form for kind in GRAMMAR if kind is not ALONE)
        raise UserError(f"rung {text!r}", expected=f"{', '.join(others)} or {last}, N at least 2")


def parse_rungs(texts: Iterable[str]) -> tuple[Rung, ...]:
    """Rungs of a checkpoint by name, sorted.

    Raises:
        UserError: for a name that is none, stands there twice, or is the backbone itself.
    """
    rungs = [Rung.parse(text) for text in texts]
    if Rung() in rungs:
        raise UserError(
            f"rung {Rung()}", "that is the backbone itself, always there", cure="leave it out"
        )
    twice = sorted({str(rung) for rung in rungs if rungs.count(rung) > 1})
    if twice:
        raise UserError(f"rung {', '.join(twice)}", "there twice")
    return tuple(sorted(rungs))


def in_words() -> str:
    """Every kind of rung that a checkpoint may have, with what it runs on."""
    kinds = (kind for kind in GRAMMAR if kind is not ALONE)
    return ", ".join(f"`{kind.form}` {kind.says}" for kind in kinds)


def row_counts(lengths: Any, factor: Any) -> Any:
    """Rows of sequences after merging: one for the pooled token, one for every M others.

    Args:
        lengths: tokens of each sequence, positive; a number, a tensor or an array.
        factor: M, or one for each sequence.
    """
    return 1 - (1 - lengths) // factor
