"""The ways through the upper layers for less, by name: ``mux:N``, ``merge:N``, both, ``exit``."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_PATTERN = re.compile(r"(?:merge:(\d+))?\+?(?:mux:(\d+))?")


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
    def saving(self) -> float:
        """Rows of the backbone that one row of this rung stands for; without end for ``exit``."""
        return math.inf if self.exit else self.merge * self.mux

    @classmethod
    def parse(cls, text: str) -> "Rung":
        """``merge:2+mux:4`` and the like: what ``str`` gives.

        Raises:
            ValueError: naming the text and what was expected.
        """
        found = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        merge, mux = (int(n or 1) for n in found.groups()) if found else (1, 1)
        rung = cls(merge, mux, exit=text == "exit")
        if str(rung) != text:
            raise ValueError(
                f"rung {text!r}: expected exit, mux:N, merge:N or merge:N+mux:N, N at least 2"
            )
        return rung


def parse_rungs(texts: Iterable[str]) -> tuple[Rung, ...]:
    """Rungs of a checkpoint by name, sorted.

    Raises:
        ValueError: for a name that is none, stands there twice, or is the backbone itself.
    """
    rungs = [Rung.parse(text) for text in texts]
    if Rung() in rungs:
        raise ValueError(f"rung {Rung()}: that is the backbone itself, always there; leave it out")
    twice = sorted({str(rung) for rung in rungs if rungs.count(rung) > 1})
    if twice:
        raise ValueError(f"rung {', '.join(twice)}: there twice")
    return tuple(sorted(rungs))
