"""What a server says of itself on ``/metrics``, between two looks at it.

For pooling requests vLLM 0.32 fills the same histograms as for generation. Its queue time begins
when the engine has taken a request in, which it does between two steps; so the wait for the step
that is running is in the end-to-end time, and in neither queue nor inference time.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from revmux_vllm.config import layer_limit
from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Rung

SETTLE_S = 5.0
HISTOGRAMS = {
    "vllm:request_queue_time_seconds": "queue_ms",
    "vllm:request_inference_time_seconds": "inference_ms",
    "vllm:e2e_request_latency_seconds": "server_ms",
}


@dataclass(frozen=True)
class Snapshot:
    """``/metrics`` at one moment, summed over engines.

    Attributes:
        rungs: requests by rung since the server started.
        sums: seconds and observations of each histogram, by the names of its mean.
        cpu_s: CPU time of the API server's process; None where there are several of them.
    """

    rungs: Counter[str] = field(default_factory=Counter)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    cpu_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Snapshot":
        """Read the text of ``/metrics``."""
        totals: defaultdict[str, float] = defaultdict(float)
        cpu_s = None
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "process_cpu_seconds_total":
                    cpu_s = sample.value
                if sample.name.removesuffix("_sum").removesuffix("_count") in HISTOGRAMS:
                    totals[sample.name] += sample.value
        sums = {
            mean: (totals[f"{name}_sum"], int(totals[f"{name}_count"]))
            for name, mean in HISTOGRAMS.items()
            if f"{name}_count" in totals
        }
        return cls(parse_rung_counts(text), sums, cpu_s)

    @classmethod
    def of(cls, base_url: str) -> "Snapshot":
        """Ask a server. Raises httpx.HTTPError unless it answers."""
        answer = httpx.get(f"{base_url}/metrics", timeout=30, trust_env=False)
        return cls.parse(answer.raise_for_status().text)

    @property
    def num_requests(self) -> int:
        """Answered since the server started; 0 where no histogram says so."""
        return max((count for _, count in self.sums.values()), default=0)

    def means_since(self, before: "Snapshot") -> dict[str, float | None]:
        """Milliseconds a request; None for a histogram that the server lacks or left empty."""
        means: dict[str, float | None] = dict.fromkeys(HISTOGRAMS.values())
        for name, (seconds, count) in self.sums.items():
            earlier_s, earlier = before.sums.get(name, (0.0, 0))
            if count > earlier:
                means[name] = 1e3 * (seconds - earlier_s) / (count - earlier)
        return means


def settled(base_url: str, before: Snapshot, num_requests: int) -> Snapshot:
    """``/metrics`` once ``num_requests`` more are counted: a step is, after its answers went out.

    What is missing after ``SETTLE_S`` stays missing.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        now = Snapshot.of(base_url)
        counted = now.num_requests - before.num_requests
        by_rung = (now.rungs - before.rungs).total() if now.rungs else num_requests
        if min(counted, by_rung) >= num_requests or time.monotonic() > deadline:
            return now
        time.sleep(0.2)


def parse_rung_counts(metrics: str) -> Counter[str]:
    """``revmux:requests_total`` by rung, out of the text of ``/metrics``."""
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "revmux:requests_total":
                counts[sample.labels["rung"]] += int(sample.value)
    return counts


def mixed_layer_limit(counts: Mapping[str, int], prefill_layers: int, num_layers: int) -> float:
    """``layer_limit`` of requests that ran at several rungs: their layer costs add up.

    Raises:
        UserError: if nothing ran.
    """
    total = sum(counts.values())
    if not total:
        raise UserError("no request was counted at any rung", cure="is the revmux plugin active?")
    cost = 0.0
    for name, n in counts.items():
        cost += n / layer_limit(Rung.parse(name), prefill_layers, num_layers)
    return total / cost
