"""The ways through the upper layers for less, by name: ``mux:N``, ``merge:N``, both, ``exit``.

Each of them may stop: ``merge:2@18`` is read after layer 18 and not at the end, and ``exit@18`` is
a sequence of which nothing is changed, read there. A plain ``exit`` is read at the cut.

A new kind of rung is a row of ``GRAMMAR``, a field of ``Rung`` where its name has a number of its
own (with its part in ``COUNTS``, ``shortening`` and ``way``), and a class in ``adapters/kinds.py``.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
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


_STOP = r"@(?P<stop>\d+)"
ALONE = Kind("alone", "alone", "every token of one sequence", re.compile("alone"))
EXIT = Kind(
    "exit",
    "exit",
    "nothing: an answer from the prefill layers alone",
    re.compile(f"(?P<exit>exit)|exit{_STOP}"),
)
COMPOSITE = Kind(
    "composite", "mux:N", "composites of N sequences", re.compile(rf"mux:(?P<mux>\d+)({_STOP})?")
)
MERGED = Kind(
    "merged",
    "merge:N",
    "one row per N neighbouring tokens",
    re.compile(rf"merge:(?P<merge>\d+)({_STOP})?"),
)
MERGED_COMPOSITE = Kind(
    "merged composite",
    "merge:N+mux:N",
    "composites of N sequences whose tokens were merged",
    re.compile(rf"merge:(?P<merge>\d+)\+mux:(?P<mux>\d+)({_STOP})?"),
)
CONTRACT = Kind(
    "contract",
    "contract",
    "one sequence alone, until an exit is sure enough of its answer",
    re.compile("(?P<sure>contract)"),
)
GRAMMAR = (ALONE, CONTRACT, EXIT, COMPOSITE, MERGED, MERGED_COMPOSITE)
TRAINED = tuple(kind for kind in GRAMMAR if kind not in (ALONE, CONTRACT))
"""Those that a checkpoint may have adapters for."""
STOPPED = "`@L` behind any of them reads the answer after layer L"
COUNTS = ("merge", "mux")
"""Fields of ``Rung`` that say how many become one row, in the order of a name."""
_READ = {"exit": bool, "stop": int, "sure": bool} | dict.fromkeys(COUNTS, int)


@dataclass(frozen=True, order=True)
class Rung:
    """What the upper layers run on; ``Rung()`` is a sequence alone, the backbone itself.

    Attributes:
        merge: neighbouring tokens of one sequence that become one row; 1 merges none.
        mux: sequences that share a composite (the width N); 1 is no composite.
        exit: no upper layer at all; the answer is read off the prefill state.
        stop: the answer is read after so many layers of the backbone; 0: after all of them.
        sure: each sequence leaves at the first exit that is sure enough, by an accuracy contract.
    """

    merge: int = 1
    mux: int = 1
    exit: bool = False
    stop: int = 0
    sure: bool = False

    def __post_init__(self) -> None:
        counts = self.merge, self.mux
        is_plain = max(*counts, self.stop + 1) == 1
        if min(counts) < 1 or self.stop < 0 or self.exit + self.sure + (not is_plain) > 1:
            raise ValueError(
                f"no such rung: {dict(self._counts())}, exit {self.exit}, stop {self.stop}, "
                f"sure {self.sure}"
            )

    def __str__(self) -> str:
        if self.exit or self.sure:
            return "exit" if self.exit else "contract"
        name = "+".join(f"{name}:{n}" for name, n in self._counts() if n > 1)
        return f"{name or 'exit'}@{self.stop}" if self.stop else name or "alone"

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
    def path(self) -> "Rung":
        """The same rung to the end: what it does to rows, wherever it stops."""
        return replace(self, stop=0)

    def saving(self, prefill_layers: int, num_layers: int) -> float:
        """How many times less the upper layers compute for it; without end for ``exit``. Of a
        contract it depends on the texts (``Contract.saving``), and is at least 1.

        Args:
            prefill_layers: l, below the cut.
            num_layers: L, all.
        """
        if self.exit:
            return math.inf
        upper = num_layers - prefill_layers
        passed = (self.stop or num_layers) - prefill_layers
        return self.shortening * self.mux * upper / passed

    @property
    def shortening(self) -> int:
        """Neighbouring tokens of one sequence that become one row; 1: as many rows as tokens."""
        return self.merge

    @property
    def reads_state(self) -> bool:
        """Read early, off the rows of one sequence: the one that speaks for it, and their mean."""
        return self.exit or bool(self.stop and self.mux == 1)

    @property
    def way(self) -> tuple[int, bool, int, bool]:
        """What is done to each sequence by itself: every field but ``mux``."""
        return self.merge, self.exit, self.stop, self.sure

    @classmethod
    def parse(cls, text: str) -> "Rung":
        """``merge:2+mux:4`` and the like: what ``str`` gives.

        Raises:
            UserError: naming the text and what was expected.
        """
        for kind in GRAMMAR if isinstance(text, str) else ():
            if found := kind.pattern.fullmatch(text):
                fields: dict[str, Any] = {k: _READ[k](v) for k, v in found.groupdict().items() if v}
                if min(fields.values(), default=1) and str(rung := cls(**fields)) == text:
                    return rung
        *others, last = (kind.form for kind in TRAINED)
        raise UserError(
            f"rung {text!r}",
            expected=f"{', '.join(others)} or {last}, N at least 2, or one with @L behind it",
        )


def parse_rungs(texts: Iterable[str]) -> tuple[Rung, ...]:
    """Rungs of a checkpoint by name, sorted.

    Raises:
        UserError: for a name that is none, stands there twice, or is the backbone itself.
    """
    rungs = [Rung.parse(text) for text in texts]
    if Rung(sure=True) in rungs:
        cure = "train some `exit@L`, and then `revmux calibrate`"
        raise UserError("rung contract", "it is calibrated, not trained", cure=cure)
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
    return ", ".join([*(f"`{kind.form}` {kind.says}" for kind in TRAINED), STOPPED])


@dataclass(frozen=True)
class Ends:
    """Which tokens of a sequence are not like the others.

    Attributes:
        pools_first: the pooled token is the first one; else it is the last.
        has_sink: the first token's row is an attention sink: all later ones attend to it, and it is
            neither merged nor mixed. Decoders have one (Xiao et al., 2024, StreamingLLM).
    """

    pools_first: bool = False
    has_sink: bool = False

    @property
    def kept(self) -> tuple[int, int]:
        """How many tokens at the beginning and at the end keep a row of their own."""
        return int(self.pools_first or self.has_sink), int(not self.pools_first)


def row_counts(lengths: Any, factor: Any, ends: Ends) -> Any:
    """Rows of sequences after merging: one for each token that is kept, one for every M others.

    Args:
        lengths: tokens of each sequence, positive; a number, a tensor or an array.
        factor: M, or one for each sequence.
        ends: which tokens are kept.
    """
    kept = sum(ends.kept)
    too_short = (lengths < kept) * (factor > 1)  # one token, where two are kept
    return kept - (kept - lengths) // factor - 1 * too_short
