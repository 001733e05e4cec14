"""How long the stages of a forward pass took, where they run.

The model marks the end of each stage, the worker takes the marks and sends the times with the
step's output, and the scheduler learns its costs from them. On a GPU the marks are events, and
nobody waits for them before the step's answers are waited for.
"""

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

LOWER, MULTIPLEX, UPPER, DEMULTIPLEX = "lower", "multiplex", "upper", "demultiplex"
STAGES = (LOWER, MULTIPLEX, UPPER, DEMULTIPLEX)


@dataclass(frozen=True)
class StepTimes:
    """One forward pass.

    Attributes:
        tokens: rows of the lower layers.
        rows: of an upper one, on average: some stop earlier than others.
        seconds: by stage.
        left: how many requests under an accuracy contract left where, by rung.
        shadows: of those that ran to the end all the same: where they would have left, by rung, and
            whether with the same answer, ``same`` or ``other``.
        trusts: how many were how sure at each stop, by rung; see ``planning.watching.TRUST_NAMES``.
    """

    tokens: int
    rows: float
    seconds: dict[str, float]
    left: dict[str, int] = field(default_factory=dict)
    shadows: dict[tuple[str, str], int] = field(default_factory=dict)
    trusts: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class MarkedPass:
    """A forward pass as it was marked: on a GPU perhaps not over yet.

    Attributes:
        tokens, rows, left, shadows, trusts: as of ``StepTimes``.
        marks: name of the stage that ended, and when: seconds, or an event of the device's.
    """

    tokens: int
    rows: float
    marks: list[tuple[str, Any]]
    left: dict[str, int]
    shadows: dict[tuple[str, str], int]
    trusts: dict[str, list[int]]

    def times(self) -> StepTimes:
        """Its times; on a GPU this waits for the pass."""
        pairs = itertools.pairwise(self.marks)
        seconds = {stage: _between(before, at) for (_, before), (stage, at) in pairs}
        told = self.left, self.shadows, self.trusts
        return StepTimes(self.tokens, self.rows, seconds, *told)


class StageClock:
    """Marks of one forward pass; those of the last ones are kept until they are taken."""

    def __init__(self) -> None:
        self._on_gpu = False
        self._marks: list[tuple[str, Any]] = []
        self._finished: deque[MarkedPass] = deque(maxlen=64)

    def start(self, device: torch.device) -> None:
        """A pass begins on ``device``."""
        self._on_gpu = device.type == "cuda"
        self._marks = [("", self._now())]

    def mark(self, stage: str) -> None:
        """``stage`` has ended."""
        self._marks.append((stage, self._now()))

    def finish(
        self,
        tokens: int,
        rows: float,
        left: dict[str, int] | None = None,
        shadows: dict[tuple[str, str], int] | None = None,
        trusts: dict[str, list[int]] | None = None,
    ) -> None:
        """The pass has ended."""
        told = left or {}, shadows or {}, trusts or {}
        self._finished.append(MarkedPass(tokens, rows, self._marks, *told))

    def take(self) -> list[MarkedPass]:
        """The passes since the last call."""
        taken = list(self._finished)
        self._finished.clear()
        return taken

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return float(after - before)
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


clock = StageClock()
"""Of this worker process: the model marks it, the worker reads it."""
