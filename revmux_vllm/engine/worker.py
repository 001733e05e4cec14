"""The worker: holds the step's plan where the attention metadata builder finds it.

It also sends the times of the step's stages back with the output, and before the first step those
of a few passes of growing size.
"""

from collections.abc import Sequence
from typing import Any

from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from revmux_vllm.engine.kv_cache import fit_kv_cache
from revmux_vllm.engine.stages import MarkedPass, StepTimes, clock
from revmux_vllm.engine.steps import StepPlan, running

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker


MEASURE_S = 0.25
"""Start-up measures passes of growing size until one takes this long."""


class TimedOutput(AsyncModelRunnerOutput):
    """vLLM's output that is still on its way, and the times of the step's passes with it.

    Args:
        output: vLLM's own.
        start_up: times from before the first step.
        passes: of the step.
    """

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        start_up: Sequence[StepTimes],
        passes: Sequence[MarkedPass],
    ) -> None:
        self._output, self._start_up, self._passes = output, start_up, passes

    def get_output(self) -> ModelRunnerOutput:
        """vLLM's, once it is there; then the passes are over too, and their times known."""
        return with_times(self._output.get_output(), self._start_up, self._passes)


def with_times(output: Any, start_up: Sequence[StepTimes], passes: Sequence[MarkedPass]) -> Any:
    """``output`` with ``revmux_times``: of every pass, those of the step last."""
    output.revmux_times = [*start_up, *(marked.times() for marked in passes)]
    return output


class RevMuxWorker(BaseWorker):
    """vLLM's worker for this platform; reads the plan off the scheduler's output."""

    _start_up: Sequence[StepTimes] = ()

    def determine_available_memory(self) -> int:
        """vLLM's, after the cache was sized by the layers' own pages, which only a worker knows."""
        fit_kv_cache(self.vllm_config, self.get_kv_cache_spec())
        available: int = super().determine_available_memory()
        return available

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, and then the layers timed; the first step brings the times to the scheduler."""
        result = super().compile_or_warm_up_model(*args, **kwargs)
        self.model_runner.get_model().warm_up_rungs()
        self._start_up = self._measure()
        return result

    def _measure(self) -> list[StepTimes]:
        """Times of passes of growing size, every rank's of the same sizes.

        Ranks that stopped at different sizes would wait for one another for ever, so the first
        rank's clock decides for all.
        """
        runner, most = self.model_runner, self.vllm_config.scheduler_config.max_num_batched_tokens
        tokens, measured = 16, []
        runner._dummy_run(tokens)  # warms up
        clock.take()
        while tokens <= most:
            runner._dummy_run(tokens)
            times = [marked.times() for marked in clock.take()]
            measured += times
            seconds = sum(sum(one.seconds.values()) for one in times)
            if get_tp_group().broadcast_object(seconds > MEASURE_S):
                break
            tokens *= 4
        return measured

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """One step under its plan."""
        plan = getattr(scheduler_output, "mux_plan", None)
        step = None
        if plan is not None:
            # V2 has no such batch; there the model's state says which row each request has.
            batch = getattr(self.model_runner, "input_batch", None)
            step = StepPlan(plan, None if batch is None else batch.req_id_to_index)
        with running(step):
            output = super().execute_model(scheduler_output, *args, **kwargs)
        if not scheduler_output.total_num_scheduled_tokens:
            return output
        start_up, self._start_up = self._start_up, ()
        if isinstance(output, AsyncModelRunnerOutput):
            return TimedOutput(output, start_up, clock.take())
        return with_times(output, start_up, clock.take())
