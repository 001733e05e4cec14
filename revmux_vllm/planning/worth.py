"""Which rungs are worth serving, by what was measured of them. Plain Python.

A rung that costs more than another and agrees less with the backbone is of no use to anybody, and
one that agrees too seldom is not what was asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from revmux_vllm.rungs import Rung

MIN_AGREEMENT = 0.95
"""Least share of answers like the backbone's, unless told otherwise."""


@dataclass(frozen=True)
class Measured:
    """What the checkpoint says of one of its rungs.

    Attributes:
        speedup: in arithmetic, against the backbone.
        agreement: share of rows with the backbone's label.
        distance: of a probability from the backbone's, on average.
    """

    speedup: float
    agreement: float
    distance: float


@dataclass(frozen=True)
class Choice:
    """Which rungs are used, and why the others are not.

    Attributes:
        used: sorted.
        left_out: rung to the reason, in words.
        unmeasured: nothing is known of any rung.
    """

    used: tuple[Rung, ...]
    left_out: Mapping[Rung, str] = field(default_factory=dict)
    unmeasured: bool = False

    def __str__(self) -> str:
        """One line."""
        if self.unmeasured:
            return (
                "the backbone alone: how well the rungs of this checkpoint agree with it was never "
                "measured. `revmux eval FOLDER --eval ROWS --save` measures and keeps it; "
                '"min_agreement": 0 uses them all the same'
            )
        words = ", ".join(map(str, self.used)) or "the backbone alone"
        reasons = "; ".join(f"{rung}: {reason}" for rung, reason in self.left_out.items())
        return f"{words}. Left out: {reasons}" if reasons else words


def choose_rungs(
    rungs: Iterable[Rung], measured: Mapping[Rung, Measured] | None, min_agreement: float
) -> Choice:
    """Those of ``rungs`` that keep ``min_agreement`` and that no other one beats.

    Args:
        rungs: to choose from.
        measured: what is known of them; None: do not ask, take all.
        min_agreement: share between 0 and 1.
    """
    rungs = sorted(rungs)
    if measured is None:
        return Choice(tuple(rungs))
    known = {rung: measured[rung] for rung in rungs if rung in measured}
    if not known:
        return Choice((), unmeasured=bool(rungs))
    reasons = {rung: _why_not(rung, known, min_agreement) for rung in rungs}
    left_out = {rung: why for rung, why in reasons.items() if why}
    return Choice(tuple(rung for rung in rungs if rung not in left_out), left_out)


def _why_not(rung: Rung, known: Mapping[Rung, Measured], min_agreement: float) -> str:
    """In words; empty if it may be used."""
    if rung not in known:
        return "not measured"
    own = known[rung]
    if own.agreement < min_agreement:
        return f"agrees {own.agreement:.1%}, below min_agreement {min_agreement:g}"
    for other, theirs in known.items():
        as_good = theirs.speedup >= own.speedup and theirs.agreement >= own.agreement
        if as_good and (theirs != own or other < rung):
            return f"{other} is no slower and agrees {theirs.agreement:.1%} to {own.agreement:.1%}"
    return ""
