"""What replicas say of themselves, and one page of several."""

import time

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from revmux_vllm.serving import stats
from revmux_vllm.serving.autoscaling import ByWork, replicas_for
from revmux_vllm.serving.stats import ReplicaStats, StatsReader, merge_pages


def page(answered: int) -> str:
    registry = CollectorRegistry()
    Counter("asked", "Requests.", ["rung"], registry=registry).labels("mux:4").inc(answered)
    Gauge("waiting", "Now.", registry=registry).set(answered + 1)
    return generate_latest(registry).decode()


def test_pages_of_several_replicas_become_one() -> None:
    merged = merge_pages({"a": page(3), "b": page(5)}).decode()
    samples = {
        (sample.name, sample.labels["replica"], sample.labels.get("rung")): sample.value
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
    }
    assert samples["asked_total", "a", "mux:4"] == 3
    assert samples["asked_total", "b", "mux:4"] == 5
    assert samples["waiting", "b", None] == 6
    assert merged.count("# TYPE asked_total counter") == 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the engine's metrics are made to say, and a clock that moves a second at each look."""
    numbers = {"arrived": 0.0, "waiting": 0.0, "widest": 0.0}
    seconds = iter(range(1000))
    monkeypatch.setattr(stats, "engine_numbers", lambda: dict(numbers))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    return numbers


def test_a_replica_that_was_never_measured_says_so(engine: dict[str, float]) -> None:
    reader = StatsReader(horizon_s=1.0)
    assert reader.look(0, is_idle=True) == ReplicaStats(look=1)
    engine.update(arrived=10)
    assert reader.look(40, is_idle=False).chars_per_s == 0


def test_load_is_work_over_what_the_widest_rung_answers(engine: dict[str, float]) -> None:
    reader = StatsReader(horizon_s=2.0)
    engine.update(arrived=100, waiting=60, widest=200)
    look = reader.look(400, is_idle=False)  # four characters a token
    assert look == ReplicaStats(1, chars_per_s=800, load=(100 + 60 / 2) / 200)
    assert reader.look(400, is_idle=True) == ReplicaStats(2, chars_per_s=800), "nothing came since"


def test_the_engines_own_metrics_are_read_by_their_names() -> None:
    from revmux_vllm.engine.metrics import RevMuxStatLogger, _Metrics

    metrics = RevMuxStatLogger._metrics or _Metrics()
    RevMuxStatLogger._metrics = metrics
    before = stats.engine_numbers()
    for number in ("0", "1"):  # of two engines
        by = {"model_name": "m", "engine": number}
        metrics.counters["arrived_tokens"].labels(**by).inc(5)
        metrics.counters["requests"].labels(rung="alone", **by).inc(3)
        metrics.counters["requests"].labels(rung="mux:2", **by).inc(4)
        metrics.waiting_tokens.labels(**by).set(7)
        metrics.capacity.labels(at="in_use", **by).set(100)
        metrics.capacity.labels(at="widest", **by).set(200)
    after = stats.engine_numbers()
    assert {key: after[key] - before[key] for key in after} == {
        "answered": 14, "arrived": 10, "waiting": 14, "widest": 400,
    }  # fmt: skip
    assert REGISTRY.get_sample_value("revmux:waiting_tokens", by) == 7


@pytest.mark.parametrize(
    ("loads", "num_replicas", "wanted"),
    [
        ([0.0], 1, 1),
        ([0.7], 1, 1),
        ([0.8], 1, 2),
        ([0.7, 0.7, 0.0, 0.0], 4, 2),
        ([2.8], 2, 8),  # the other has not reported yet
        ([0.35, 0.35], 2, 1),
    ],
)
def test_replicas_for_the_load(loads: list[float], num_replicas: int, wanted: int) -> None:
    assert replicas_for(loads, num_replicas, target_load=0.7) == wanted


class Context:
    """The part of Ray's AutoscalingContext that the policy reads."""

    current_num_replicas, target_num_replicas = 2, 3

    def __init__(self, loads: dict[str, float] | None) -> None:
        self.aggregated_metrics = None if loads is None else {"load": loads}


def test_without_statistics_nothing_changes() -> None:
    policy = ByWork(target_load=0.7)
    assert policy(Context(None)) == (3, {})
    assert policy(Context({})) == (3, {})
    assert policy(Context({"a": 1.4, "b": 0.0})) == (2, {})
