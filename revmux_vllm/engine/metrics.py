"""Requests by rung on vLLM's ``/metrics``.

The scheduler lives in the engine process and the metrics in the API server's. What travels between
them is vLLM's ``SchedulerStats``, a fixed set of fields. ``waiting_lora_adapters`` is the one free
mapping among them and means something only with ``--enable-lora``, which RevMUX refuses; so the
counts ride there. The contract test fails when vLLM offers a better place.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from revmux_vllm.rungs import Rung

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KEY = "revmux:rung:"


def put_rung_counts(stats: SchedulerStats, counts: Mapping[Rung, int]) -> None:
    """Put requests by rung into ``stats``."""
    stats.waiting_lora_adapters = {f"{_KEY}{rung}": n for rung, n in counts.items()}


def take_rung_counts(stats: SchedulerStats) -> dict[str, int]:
    """Requests by the name of their rung, as ``put_rung_counts`` put them."""
    return {
        key.removeprefix(_KEY): n
        for key, n in stats.waiting_lora_adapters.items()
        if key.startswith(_KEY)
    }


class RevMuxStatLogger(StatLoggerBase):
    """Plugin of group ``vllm.stat_logger_plugins``; silent for other models."""

    _requests: Counter | None = None

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None:
        self.labels = {
            "model_name": str(vllm_config.model_config.served_model_name),
            "engine": str(engine_index),
        }
        if hasattr(vllm_config.model_config.hf_config, "revmux") and not RevMuxStatLogger._requests:
            RevMuxStatLogger._requests = Counter(
                "revmux:requests",
                "Requests by the rung they ran at: mux:N, merge:N, exit; alone is the backbone.",
                ["model_name", "engine", "rung"],
            )

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Count what the last steps ran."""
        if self._requests is None or scheduler_stats is None:
            return
        for rung, n in take_rung_counts(scheduler_stats).items():
            self._requests.labels(rung=rung, **self.labels).inc(n)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
