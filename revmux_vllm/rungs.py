"""The ways through the upper layers for less, by name: ``mux:N``, ``merge:N``, both, ``exit``.

A new kind of rung is a row of ``GRAMMAR`` and, where adapters are (``adapters/kinds.py``), a class.
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
        pattern: of a whole name; its groups are fields of ``Rung``.
    """

    name: str
    form: str
    pattern: re.Pattern[str]


ALONE = Kind("alone", "alone", re.compile("alone"))
EXIT = Kind("exit", "exit", re.compile("(?P<exit>exit)"))
COMPOSITE = Kind("composite", "mux:N", re.compile(r"mux:(?P<mux>\d+)"))
MERGED = Kind("merged", "merge:N", re.compile(r"merge:(?P<merge>\d+)"))
MERGED_COMPOSITE = Kind(
    "merged composite", "merge:N+mux:N", re.compile(r"merge:(?P<merge>\d+)\+mux:(?P<mux>\d+)")
)
GRAMMAR = (ALONE, EXIT, COMPOSITE, MERGED, MERGED_COMPOSITE)
_READ = {"merge": int, "mux": int, "exit": bool}


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
        if min(self.merge, self.mux) < 1 or (self.exit and self.merge * self.mux > 1):
            raise ValueError(f"no such rung: merge {self.merge}, mux {self.mux}, exit {self.exit}")

    def __str__(self) -> str:
        if self.exit:
            return "exit"
        named = {"merge": self.merge, "mux": self.mux}
        return "+".join(f"{name}:{n}" for name, n in named.items() if n > 1) or "alone"

    @property
    def kind(self) -> Kind:
        """The row of the grammar that it is written by."""
        return next(kind for kind in GRAMMAR if kind.pattern.fullmatch(str(self)))

    @property
    def saving(self) -> float:
        """Rows of the backbone that one row of this rung stands for; without end for ``exit``."""
        return math.inf if self.exit else self.merge * self.mux

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


def row_counts(lengths: Any, factor: Any) -> Any:
    """Rows of sequences after merging: one for the pooled token, one for every M others.

    Args:
        lengths: tokens of each sequence, positive; a number, a tensor or an array.
        factor: M, or one for each sequence.
    """
    return 1 - (1 - lengths) // factor
