"""How long the stages of a forward pass took, where they run.

The model marks the end of each stage, the worker takes the times and sends them with the step's
output, and the scheduler learns its costs from them. On a GPU the marks are events, which nobody
waits for before the step is over.
"""

import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

LOWER, MULTIPLEX, UPPER, DEMULTIPLEX = "lower", "multiplex", "upper", "demultiplex"
STAGES = (LOWER, MULTIPLEX, UPPER, DEMULTIPLEX)


@dataclass(frozen=True)
class StepTimes:
    """One forward pass.

    Attributes:
        tokens: rows of the lower layers.
        rows: of the upper ones.
        seconds: by stage.
    """

    tokens: int
    rows: int
    seconds: dict[str, float]


class StageClock:
    """Marks of one forward pass; those of the last ones are kept until they are taken."""

    def __init__(self) -> None:
        self._on_gpu = False
        self._marks: list[tuple[str, Any]] = []
        self._finished: deque[tuple[int, int, list[tuple[str, Any]]]] = deque(maxlen=64)

    def start(self) -> None:
        """A pass begins."""
        self._on_gpu = torch.cuda.is_available()
        self._marks = [("", self._now())]

    def mark(self, stage: str) -> None:
        """``stage`` has ended."""
        self._marks.append((stage, self._now()))

    def finish(self, tokens: int, rows: int) -> None:
        """The pass has ended."""
        self._finished.append((tokens, rows, self._marks))

    def take(self) -> list[StepTimes]:
        """Times of the passes since the last call; on a GPU this waits for them."""
        taken = []
        while self._finished:
            tokens, rows, marks = self._finished.popleft()
            seconds = {
                stage: _between(before, at)
                for (_, before), (stage, at) in itertools.pairwise(marks)
            }
            taken.append(StepTimes(tokens, rows, seconds))
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
