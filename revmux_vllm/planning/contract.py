"""The accuracy contract of a checkpoint: after which layers a request may leave, and how sure it
must be. Plain Python.

How sure an answer is, its *trust*, is a sum of margins: by how much the answer leads, in log
probability, at this stop and at every one before it. ``revmux calibrate`` fits the sum and finds
the thresholds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Rung

LEAST_ABOVE = 0.02
"""Share of the upper layers' work that is counted at least, wherever most requests leave."""


@dataclass(frozen=True)
class Contract:
    """One promise, and what keeps it.

    Attributes:
        agreement: at least this share of the answers is the backbone's.
        confidence: with which that holds for traffic like the rows it was calibrated on.
        probability: an answer counts as the backbone's only if its probabilities are at most so
            far from the backbone's, too; None: the label alone counts.
        per_class: the promise holds for each of the backbone's classes by itself.
        stops: ``exit`` rungs of the checkpoint, by depth.
        weights: of each stop, of the margin at every stop up to it.
        biases: of each stop.
        thresholds: least trust to leave with, of each stop; None where nobody leaves.
        speedup, measured, shares: on the rows that it was tested on: in arithmetic, the agreement,
            and the share of rows that left at each stop.
        rows: how many these were.
    """

    agreement: float
    confidence: float
    probability: float | None
    per_class: bool
    stops: tuple[Rung, ...]
    weights: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...]
    thresholds: tuple[float | None, ...]
    speedup: float
    measured: float
    shares: tuple[float, ...]
    rows: int

    @property
    def terms(self) -> tuple[float, float | None, bool]:
        """What is promised: two contracts of one checkpoint differ in it."""
        return self.agreement, self.probability, self.per_class

    def __str__(self) -> str:
        words = f"{100 * self.agreement:g} %"
        if self.probability is not None:
            words += f" within {self.probability:g}"
        return words + (" of each class" if self.per_class else "")

    def in_words(self) -> str:
        """One line for a log."""
        stops = zip(self.stops, self.thresholds, strict=True)
        used = ", ".join(str(stop) for stop, least in stops if least is not None)
        return (
            f"accuracy contract {self}, with confidence {self.confidence:g} for text like the "
            f"{self.rows} rows that tested it ({self.measured:.2%} there, {self.speedup:.2f}x in "
            f"arithmetic): busy, requests leave at {used}"
        )

    def saving(self, prefill_layers: int, num_layers: int) -> float:
        """How many times less the upper layers compute, for texts like those that tested it.

        Args:
            prefill_layers: l, below the cut.
            num_layers: L, all.
        """
        above = (num_layers / self.speedup - prefill_layers) / (num_layers - prefill_layers)
        return 1 / min(1.0, max(LEAST_ABOVE, above))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict`` reads it back."""
        return asdict(self) | {"stops": [str(stop) for stop in self.stops]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Contract":
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: where something is missing, or unknown here.
        """
        known = {field.name for field in fields(cls)}
        if known != set(values):
            odd = ", ".join(sorted(known ^ set(values)))
            cure = "calibrate it again with this version"
            raise UserError("contract", f"missing or unknown: {odd}", cure=cure)
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        read["stops"] = tuple(map(Rung.parse, values["stops"]))
        read["weights"] = tuple(map(tuple, values["weights"]))
        return cls(**read)


def find_contract(
    contracts: Iterable[Contract], agreement: float, probability: float | None, per_class: bool
) -> Contract:
    """The one of these terms.

    Raises:
        UserError: naming those there are, and the command that calibrates another.
    """
    contracts = list(contracts)
    for contract in contracts:
        if contract.terms == (agreement, probability, per_class):
            return contract
    more = "" if probability is None else f" --probability {probability:g}"
    more += " --per-class" if per_class else ""
    command = f"revmux calibrate FOLDER --data TEXTS --agreement {agreement:g}{more}"
    known = "; ".join(map(str, contracts)) or "nothing"
    raise UserError(
        "`agreement`",
        f"the checkpoint is not calibrated for it, but for {known}",
        found=agreement,
        cure=f"calibrate it: {command}",
    )
