"""The worker: holds the step's plan where the attention metadata builder finds it.

It also sends the times of the step's stages back with the output, and before the first step those
of a few passes of growing size.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform

from revmux_vllm.engine.stages import clock
from revmux_vllm.planning.packing import MuxPlan
from revmux_vllm.rungs import Rung

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker


MEASURE_S = 0.25
"""Start-up measures passes of growing size until one takes this long."""


@dataclass(frozen=True)
class StepPlan:
    """The plan of the step that runs now.

    Attributes:
        plan: composites by request id.
        row_of: request id to row of the batch. The model runner fills it while it prepares the
            step, so it is read only when metadata is built.
    """

    plan: MuxPlan
    row_of: Mapping[str, int]

    def groups(self) -> list[tuple[Rung, tuple[int, ...]]]:
        """Composites by row of the batch, carrier first, and their rungs."""
        return [
            (rung, tuple(self.row_of[member] for member in group))
            for rung, group in zip(self.plan.rungs, self.plan.groups, strict=True)
        ]


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


class RevMuxWorker(BaseWorker):
    """vLLM's worker for this platform; reads the plan off the scheduler's output."""

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, and then the layers timed; the first step brings the times to the scheduler."""
        result = super().compile_or_warm_up_model(*args, **kwargs)
        tokens, most = 16, self.vllm_config.scheduler_config.max_num_batched_tokens
        self.model_runner._dummy_run(tokens)
        clock.take()
        while tokens <= most:
            began = time.perf_counter()
            self.model_runner._dummy_run(tokens)
            if time.perf_counter() - began > MEASURE_S:
                break
            tokens *= 4
        return result

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """One step under its plan."""
        plan = getattr(scheduler_output, "mux_plan", None)
        step = None
        if plan is not None:
            step = StepPlan(plan, self.model_runner.input_batch.req_id_to_index)
        with running(step):
            output = super().execute_model(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            output.revmux_times = clock.take()
        return output
