"""The step that runs now: its plan, where the attention metadata builder finds it.

Both of vLLM's model runners order the requests of a batch in their own way, so a plan is by
request id, and the runner's seam says which row each request has: V1's batch by itself
(``worker.py``), V2's through the model's state (``model_state.py``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from revmux_vllm.planning.packing import MuxPlan
from revmux_vllm.rungs import Rung


@dataclass
class StepPlan:
    """The plan of the step that runs now.

    Attributes:
        plan: composites by request id.
        row_of: request id to row of the batch. The model runner fills it while it prepares the
            step, so it is read only when metadata is built. None until V2's seam knows it.
        layout: of the step, once the first builder has made it; the others take it from here.
    """

    plan: MuxPlan
    row_of: Mapping[str, int] | None = None
    layout: Any = field(default=None, repr=False)

    def groups(self) -> list[tuple[Rung, tuple[int, ...]]]:
        """Composites by row of the batch, carrier first, and their rungs."""
        assert self.row_of is not None, (
            "this model runner builds attention metadata before RevMUX knows the rows of its "
            "batch: neither vLLM's V1 runner nor its V2 runner with the model's own state"
        )
        row_of = self.row_of
        return [
            (rung, tuple(row_of[member] for member in group))
            for rung, group in zip(self.plan.rungs, self.plan.groups, strict=True)
        ]

    def take_rows(self, request_ids: Sequence[str]) -> None:
        """The batch has these requests, in this order."""
        self.row_of = {request_id: row for row, request_id in enumerate(request_ids)}


_current: StepPlan | None = None


def current_step() -> StepPlan | None:
    """The plan of the running step; None in profiling and warm-up runs."""
    return _current


@contextmanager
def running(step: StepPlan | None) -> Iterator[None]:
    """Make ``step`` the current one for the duration."""
    global _current
    _current = step
    try:
        yield
    finally:
        _current = None
