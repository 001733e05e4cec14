"""Engine-only throughput against the backbone alone, in the same run.

The backbone alone, every rung and the policy ``load`` over all of them classify the same prompts in
turn, in alternating order; each ratio compares the two of one round, and stands beside two others:
the layer limit, and the speed-up in arithmetic at the prompts' mean length, with attention counted
as vLLM's kernels compute it. No HTTP and no tokenising: prompts are token ids. The backbone alone
is plain vLLM in a process of its own, or RevMUX's engine at width 1 where vLLM has no class for it.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from revmux_vllm import checkpoint
from revmux_vllm.bench.arithmetic import speedups
from revmux_vllm.bench.failures import MeasuringError
from revmux_vllm.bench.settings import OfflineSettings
from revmux_vllm.bench.workload import Model, prepare_prompts, read_model
from revmux_vllm.config import layer_limit
from revmux_vllm.engine.in_process import InProcessEngine, chosen_dtype
from revmux_vllm.engine.plain import PlainEngine, PlainEngineError
from revmux_vllm.errors import UserError
from revmux_vllm.planning.contract import find_contract
from revmux_vllm.rungs import Rung

PLAIN, ALONE = "plain vLLM", "alone"
"""The baseline: the backbone under vLLM's own class, or at width 1 of the checkpoint's engine."""

Prompts = list[list[int]]
Rate = Callable[[Prompts], float]
"""From prompts, which all wait at once, to requests per second."""


class EngineError(MeasuringError):
    """An engine did not start."""


class Row(NamedTuple):
    """A row of the report: what runs on which model, its layer limit, and its speed-up in
    arithmetic."""

    model: Model
    label: str
    rungs: Rung | tuple[Rung, ...]
    limit: float
    arithmetic: float


def run(
    settings: OfflineSettings, console: Console, beside: Mapping[str, Rate] | None = None
) -> dict[str, Any]:
    """Measure checkpoints against their backbone alone, and stop all engines whatever happens.

    Args:
        settings: the options of the command.
        console: for the progress.
        beside: further contenders by name; the report has their ``NAME_requests_per_s``.

    Returns:
        What ``revmux bench offline --json`` prints, without the model's name.

    Raises:
        UserError: for a model or an option that cannot be measured.
        EngineError: if an engine does not start.
    """
    beside = beside or {}
    models = [read_model(name, settings.load_format) for name in settings.models]
    lengths, prompts = prepare_prompts(settings, models[0])
    mean = statistics.mean(map(len, prompts))
    rows = [row for model in models for row in rows_of(model, settings.rungs, round(mean))]
    promise: dict[str, Any] = {}
    if settings.agreement is not None:
        rows.insert(-1, contract_row(models[0], settings.agreement))
        promise["additional_config"] = {"revmux": {"agreement": settings.agreement}}
    options = engine_options(settings, max(map(len, prompts)))
    shared = settings.shared_prefix
    with Progress(console=console) as progress, ExitStack() as stack:
        task = progress.add_task("starting the engines", total=len(models) + 1)
        engines = {}
        for model in models:
            own = promise if model is models[0] else {}
            engines[model] = start_multiplexed(model, options | own, stack)
            progress.advance(task)
        first = models[0]
        baseline, alone = start_baseline(first, engines[first], options, stack, shared)
        progress.advance(task)
        contenders: dict[Any, Rate] = {
            row: at(engines[row.model], row.rungs, shared) for row in rows
        }
        contenders |= {**beside, baseline: alone}
        rates = measure(contenders, prompts, settings.rounds, progress)
    return {
        "lengths": str(lengths),
        "shared_prefix": settings.shared_prefix,
        "requests": len(prompts),
        "mean_tokens": mean,
        "rounds": settings.rounds,
        "dtype": options["dtype"],
        "baseline": baseline,
        "plain_requests_per_s": statistics.median(rates[baseline]),
        **{f"{name}_requests_per_s": statistics.median(rates[name]) for name in beside},
        "configurations": [as_object(row, rates[row], rates[baseline]) for row in rows],
    }


def rows_of(model: Model, rungs: tuple[Rung, ...] | None, num_tokens: int) -> list[Row]:
    """The rows of a model: alone, of each of ``rungs``, all of its own for None, and of ``load``,
    which chooses among ``rungs``, or for None among those that a server uses.

    ``num_tokens``: of a prompt.

    Raises:
        UserError: for a rung that the checkpoint lacks.
    """
    own = model.config.rungs
    chosen = own if rungs is None else rungs
    if missing := [str(rung) for rung in chosen if rung not in own]:
        problem = f"the checkpoint has no {', '.join(missing)}; it has {', '.join(map(str, own))}"
        raise UserError("`rungs`", problem)
    by_load = model.in_use if rungs is None else rungs
    shape = model.config.prefill_layers, model.num_layers
    counted = speedups(model, (Rung(), *chosen, *by_load), num_tokens)
    most = {rung: (layer_limit(rung, *shape), counted[rung]) for rung in counted}
    single = [Row(model, str(rung), rung, *most[rung]) for rung in chosen]
    if model.plain_architecture is not None:  # else it is the baseline
        single.insert(0, Row(model, ALONE, Rung(), *most[Rung()]))
    limit, arithmetic = map(max, zip(*(most[rung] for rung in (Rung(), *by_load)), strict=True))
    return [*single, Row(model, "load", by_load, limit, arithmetic)]


def contract_row(model: Model, agreement: float) -> Row:
    """The row of a contract; its limit too is what its calibration saw in arithmetic.

    Raises:
        UserError: where the checkpoint is not calibrated for it.
    """
    contracts = checkpoint.read_contracts(model.folder)
    contract = find_contract(contracts, agreement, probability=None, per_class=False)
    speedup = contract.speedup
    return Row(model, f"contract {contract}", Rung(sure=True), limit=speedup, arithmetic=speedup)


def engine_options(settings: OfflineSettings, longest: int) -> dict[str, Any]:
    """Options of ``vllm.LLM`` for all engines.

    Args:
        settings: the options of the command.
        longest: prompt, in tokens.
    """
    load_format = settings.load_format or "auto"
    options = {
        "dtype": chosen_dtype(settings.dtype),
        "load_format": load_format,
        "max_model_len": longest,
        "enforce_eager": settings.enforce_eager,
    }
    if load_format == "dummy":
        options["skip_tokenizer_init"] = True  # prompts are token ids
    return options


def start_multiplexed(model: Model, options: dict[str, Any], stack: ExitStack) -> InProcessEngine:
    """RevMUX's engine, closed with ``stack``; raises EngineError unless it starts."""
    with _told(f"the engine of {model.name}", ValueError):  # vLLM refuses an option
        engine = InProcessEngine(model.folder, **options)
    stack.callback(engine.close)
    return engine


def start_baseline(
    model: Model,
    engine: InProcessEngine,
    options: dict[str, Any],
    stack: ExitStack,
    shared_prefix: int = 0,
) -> tuple[str, Rate]:
    """The backbone of a model alone, under vLLM's own class or at width 1 of its ``engine``."""
    if model.plain_architecture is None:
        return ALONE, at(engine, Rung(), shared_prefix)
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="revmux-plain-")))
    with _told("plain vLLM", PlainEngineError):  # its process has printed more
        plain = PlainEngine(
            checkpoint.plain_backbone(model.folder, folder),
            hf_overrides={"architectures": [model.plain_architecture]},
            kv_cache_memory_bytes=1 << 30,
            **options,
        )
    stack.callback(plain.close)
    rounds = count()

    def rate(prompts: Prompts) -> float:
        own, salt = fresh(prompts, shared_prefix, next(rounds))
        return len(prompts) / plain.seconds(own, salt)

    return PLAIN, rate


@contextmanager
def _told(what: str, kind: type[Exception]) -> Iterator[None]:
    """EngineError in place of a ``kind`` of error that says why ``what`` does not start."""
    try:
        yield
    except UserError:
        raise
    except kind as error:
        raise EngineError(f"{what} does not start: {error}") from error


def fresh(prompts: Prompts, shared_prefix: int, number: int) -> tuple[Prompts, str]:
    """Prompts of a round, and their ``cache_salt``: nothing of them is in the cache but the prefix.

    Without one every round is another tenant's; with one the first token behind it is another.
    """
    if not shared_prefix:
        return prompts, f"round {number}"
    own, words = [list(prompt) for prompt in prompts], sorted(set(prompts[0]))
    for prompt in own:
        prompt[shared_prefix] = words[number % len(words)]
    return own, "bench"


def at(engine: InProcessEngine, rungs: Rung | tuple[Rung, ...], shared_prefix: int = 0) -> Rate:
    """How fast an engine answers at one rung, or at what the load asks for among several.

    ``shared_prefix``: tokens that prompts begin with and that may be found in the cache.
    """
    rounds = count()

    def rate(prompts: Prompts) -> float:
        engine.run_at(rungs)
        own, salt = fresh(prompts, shared_prefix, next(rounds))
        start = time.perf_counter()
        engine.classify(own, salts=[f"{salt}, {rungs}"] * len(prompts))
        return len(prompts) / (time.perf_counter() - start)

    return rate


def measure(
    contenders: Mapping[Any, Rate], prompts: Prompts, rounds: int, progress: Progress
) -> dict[Any, list[float]]:
    """Requests per second of every contender in every round, by name, after one round to warm up.

    Args:
        contenders: asked in this order and in the reverse one by turns.
        prompts: token ids, the same for all.
        rounds: after the one to warm up.
        progress: where the rounds are shown.
    """
    task = progress.add_task("measuring", total=(rounds + 1) * len(contenders))
    rates: dict[Any, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name in contenders if turn % 2 else reversed(contenders):
            rates[name].append(contenders[name](prompts))
            progress.advance(task)
    return {name: own[1:] for name, own in rates.items()}


def as_object(row: Row, rates: list[float], alone: list[float]) -> dict[str, Any]:
    """A row of the report."""
    values = summary(rates, alone, row.limit)
    return values | {
        "arithmetic": row.arithmetic,
        "ratio_over_arithmetic": values["ratio"] / row.arithmetic,
        "rung": row.label,
        "prefill_layers": row.model.config.prefill_layers,
    }


def summary(rates: list[float], alone: list[float], limit: float) -> dict[str, Any]:
    """Median and spread against the backbone alone, round by round.

    Args:
        rates: requests per second in every round.
        alone: the backbone's.
        limit: the layer limit.
    """
    ratios = [mine / theirs for mine, theirs in zip(rates, alone, strict=True)]
    return {
        "requests_per_s": statistics.median(rates),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratios": ratios,
        "layer_limit": limit,
        "ratio_over_limit": statistics.median(ratios) / limit,
    }
