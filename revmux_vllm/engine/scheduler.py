"""vLLM's scheduler, and after it the plan: who of this step shares a composite."""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.metrics import put_rung_counts
from revmux_vllm.engine.policy import read_policy
from revmux_vllm.packing import MuxPlan, plan_requests
from revmux_vllm.rungs import Rung


@dataclass
class RevMuxSchedulerOutput(SchedulerOutput):
    """vLLM's step with the plan beside it; pickled to the workers as it is."""

    mux_plan: MuxPlan | None = None


class RevMuxScheduler(Scheduler):
    """``Scheduler`` whose steps carry a ``MuxPlan``. vLLM chooses requests, we group them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.revmux = RevMuxConfig.from_dict(self.vllm_config.model_config.hf_config.revmux)
        self.policy = read_policy(self.vllm_config.additional_config, self.revmux)
        self.requests_by_rung: Counter[Rung] = Counter()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step of vLLM's scheduler, planned."""
        output = super().schedule(*args, **kwargs)
        scheduled = output.num_scheduled_tokens
        plan = plan_requests(
            list(scheduled),
            list(scheduled.values()),
            self.policy.allowed(len(scheduled)),
            # Members influence one another's answer, so tenants are kept apart.
            [self.requests[request_id].cache_salt for request_id in scheduled],
        )
        self.requests_by_rung.update(plan.counts())
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        return RevMuxSchedulerOutput(**values, mux_plan=plan)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, with the requests by rung since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            put_rung_counts(stats, self.requests_by_rung)
            self.requests_by_rung.clear()
        return stats
