"""What the scheduler counts, on vLLM's ``/metrics`` and in its log.

The scheduler lives in the engine process and the metrics in the API server's. What travels between
them is vLLM's ``SchedulerStats``, a fixed set of fields. ``waiting_lora_adapters`` is the one free
mapping among them and means something only with ``--enable-lora``, which RevMUX refuses; so the
counts ride there, whole numbers all of them. The contract test fails when vLLM offers a better
place.

With several API servers each gets the statistics of some steps, every step's goes to one of them
(v1/core/sched/scheduler.py, ``update_from_output``). Prometheus adds up their counters, and of a
gauge takes what was set last (``mostrecent``, as vLLM's own gauges do). A line in the log could
speak of one server's share only, so there is none, as there is none of vLLM's.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from revmux_vllm.engine.stages import STAGES
from revmux_vllm.planning.planner import Counts
from revmux_vllm.planning.watching import interval

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.revmux")

_KEY = "revmux"
_BUCKETS = tuple(m * 10.0**e for e in range(-4, 2) for m in (1, 2.5, 5))


def put_counts(stats: SchedulerStats, counts: Mapping[tuple[str, str], int]) -> None:
    """Put the planner's ``counts`` into ``stats``, and the present state, of kind ``now``."""
    stats.waiting_lora_adapters = {
        f"{_KEY}|{kind}|{label}": n for (kind, label), n in counts.items()
    }


def take_counts(stats: SchedulerStats) -> Counts:
    """The counts as ``put_counts`` put them."""
    counts: Counts = Counter()
    for key, n in stats.waiting_lora_adapters.items():
        if key.startswith(f"{_KEY}|"):
            _, kind, label = key.split("|")
            counts[kind, label] += n
    return counts


def _counters(by: list[str]) -> dict[str, prometheus.Counter]:
    """By the kind of a count; ``by`` names the labels that all have."""
    return {
        "requests": prometheus.Counter(
            "revmux:requests",
            "Requests by the rung they ran at; alone is the backbone.",
            [*by, "rung"],
        ),
        "composites": prometheus.Counter(
            "revmux:composites",
            "Sequences that the upper layers ran on, by rung: a composite is one.",
            [*by, "rung"],
        ),
        "contract": prometheus.Counter(
            "revmux:contract_requests",
            "Requests answered under the accuracy contract, by where they were sure; alone is the "
            "end.",
            [*by, "left"],
        ),
        "shadow": prometheus.Counter(
            "revmux:shadow_requests",
            "Requests under the accuracy contract that ran to the end as a sample: whether the "
            "contract's answer would have been the same one, or another.",
            [*by, "answer"],
        ),
        "trust": prometheus.Counter(
            "revmux:contract_trust",
            "How sure the stops of the accuracy contract were of the requests that came to them, "
            "in log odds, by the stop.",
            [*by, "stop", "trust"],
        ),
        "fallbacks": prometheus.Counter(
            "revmux:fallbacks",
            "Requests that ran alone, by reason: light_load, no_partner, isolation, exact, "
            "policy, long (longer than a step, or beside a part of such a one), prefix (so that "
            "others find in the cache what they begin with).",
            [*by, "reason"],
        ),
        "composite_slots": prometheus.Counter(
            "revmux:composite_slots",
            "Rows of composites times their streams; over composite_tokens, less one, it is "
            "the padding waste.",
            by,
        ),
        "composite_tokens": prometheus.Counter(
            "revmux:composite_tokens", "Tokens of the members of composites.", by
        ),
        "cached_tokens": prometheus.Counter(
            "revmux:cached_tokens",
            "Tokens of prefixes that were found in the cache, by the rung they were found at.",
            [*by, "rung"],
        ),
        "arrived_tokens": prometheus.Counter(
            "revmux:arrived_tokens", "Tokens of the requests that arrived.", by
        ),
    }


class _Metrics:
    """Prometheus' own objects, made once in a process."""

    def __init__(self) -> None:
        by = ["model_name", "engine"]  # and then the label of a count, if it has one
        self.counters = _counters(by)
        self.waiting_tokens = prometheus.Gauge(
            "revmux:waiting_tokens",
            "Tokens of the requests that wait, and of chunks still to run, after the last step.",
            by,
            multiprocess_mode="mostrecent",
        )
        self.capacity = prometheus.Gauge(
            "revmux:capacity_tokens_per_second",
            "Estimate of what full steps answer: at the rung in use (in_use), and at the cheapest "
            "that the policy may take (widest).",
            [*by, "at"],
            multiprocess_mode="mostrecent",
        )
        self.agreement = prometheus.Gauge(
            "revmux:contract_agreement",
            "Live agreement of the accuracy contract by its shadow requests: estimate, and the low "
            "and high end of its interval of confidence 0.95.",
            [*by, "bound"],
            multiprocess_mode="mostrecent",
        )
        self.drift = prometheus.Gauge(
            "revmux:contract_drift",
            "How far the last requests under the contract left from where its calibration's rows "
            "did; from 1 on the promise may not hold.",
            by,
            multiprocess_mode="mostrecent",
        )
        self.step_seconds = prometheus.Histogram(
            "revmux:step_seconds",
            "Time of a step by stage: plan, lower, multiplex, upper, demultiplex, and the whole "
            "step.",
            [*by, "stage"],
            buckets=_BUCKETS,
        )
        self.linger_seconds = prometheus.Counter(
            "revmux:linger_seconds", "Time the engine waited for partners (linger_ms).", by
        )
        self.backbone_seconds = prometheus.Counter(
            "revmux:backbone_seconds",
            "Estimated time that the same steps would have taken with every request alone; over "
            "the sum of step_seconds it is the speed-up.",
            by,
        )


class RevMuxStatLogger(StatLoggerBase):
    """Found by vLLM where ``stat_logger_entry.py`` offers it; silent for other models."""

    _metrics: _Metrics | None = None

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None:
        self.labels = {
            "model_name": str(vllm_config.model_config.served_model_name),
            "engine": str(engine_index),
        }
        self.since_log: Counts = Counter()
        self.shadows: Counter[str] = Counter()
        self.sees_every_step = vllm_config.parallel_config._api_process_count == 1
        self.is_ours = hasattr(vllm_config.model_config.hf_config, "revmux")
        if self.is_ours and not RevMuxStatLogger._metrics:
            RevMuxStatLogger._metrics = _Metrics()
        self.is_shown = False
        if self.sees_every_step:
            self._show()

    def _show(self) -> None:
        """Let all metrics without a label of their own be there, at zero, before they count.

        With several API servers not before the engine's first statistics: under
        ``--disable-log-stats`` it then sends none (entrypoints/cli/serve.py,
        ``run_multi_api_server``), and zeros would say that nothing runs.
        """
        metrics = self._metrics
        if self.is_shown or not self.is_ours or metrics is None:
            return
        self.is_shown = True
        names = ("composite_slots", "composite_tokens", "arrived_tokens")
        plain = [metrics.counters[name] for name in names]
        for metric in (
            *plain,
            metrics.linger_seconds,
            metrics.backbone_seconds,
            metrics.waiting_tokens,
        ):
            metric.labels(**self.labels)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Count what the last step did."""
        if self._metrics is None or not self.is_ours or scheduler_stats is None:
            return
        self._show()
        counts = take_counts(scheduler_stats)
        self.since_log += counts
        for (kind, label), n in counts.items():
            if kind == "us":
                self._record_time(label, n / 1e6)
                continue
            if kind == "now":
                self._set(label, n)
                continue
            # One label, or the two of a trust, or none.
            more = label.split(" ", 1) if kind == "trust" else filter(None, [label])
            by = (*self.labels.values(), *more)
            self._metrics.counters[kind].labels(*by).inc(n)
            if kind == "shadow":
                self._record_shadows(label, n)

    def _set(self, what: str, tokens: int) -> None:
        assert self._metrics is not None
        if what == "waiting":
            self._metrics.waiting_tokens.labels(**self.labels).set(tokens)
        elif what == "drift":
            self._metrics.drift.labels(**self.labels).set(tokens / 100)
        else:
            self._metrics.capacity.labels(at=what, **self.labels).set(tokens)

    def _record_shadows(self, answer: str, n: int) -> None:
        assert self._metrics is not None
        self.shadows[answer] += n
        count = self.shadows.total()
        low, high = interval(self.shadows["same"], count)
        bounds = {"estimate": self.shadows["same"] / count, "low": low, "high": high}
        for bound, value in bounds.items():
            self._metrics.agreement.labels(bound=bound, **self.labels).set(value)

    def _record_time(self, stage: str, seconds: float) -> None:
        assert self._metrics is not None
        if stage == "linger":
            self._metrics.linger_seconds.labels(**self.labels).inc(seconds)
        elif stage == "backbone":
            self._metrics.backbone_seconds.labels(**self.labels).inc(seconds)
        else:
            self._metrics.step_seconds.labels(stage=stage, **self.labels).observe(seconds)

    def log(self) -> None:
        """One line beside vLLM's own, for the interval since the last; none where nothing ran."""
        if self.sees_every_step and (line := summary(self.since_log)):
            logger.info("Engine %03d: RevMUX: %s", int(self.labels["engine"]), line)
        self.since_log.clear()

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def summary(counts: Counts) -> str:
    """What happened, in words; empty where nothing did."""
    requests = {rung: n for (kind, rung), n in sorted(counts.items()) if kind == "requests"}
    if not (total := sum(requests.values())):
        return ""
    parts = [f"{total} requests", *(f"{rung} {n / total:.0%}" for rung, n in requests.items())]
    if tokens := counts["composite_tokens", ""]:
        parts.append(f"padding {counts['composite_slots', ''] / tokens - 1:.1%}")
    if step := counts["us", "step"]:
        stages = ("plan", *STAGES)
        shares = ", ".join(f"{stage} {counts['us', stage] / step:.0%}" for stage in stages)
        parts.append(f"{step / 1e6:.1f} s in steps ({shares})")
        parts.append(f"about {counts['us', 'backbone'] / step:.2f}x of the backbone alone")
    return ", ".join(parts)
