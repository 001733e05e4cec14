"""Engine-only throughput against plain vLLM on the same backbone, in the same run.

Plain vLLM, every rung and the policy ``load`` over all of them classify the same prompts in turn,
in alternating order; each ratio compares the two of one round. No HTTP and no tokenising: prompts
are token ids. Schedulers run in this process, so that one engine serves several rungs.
"""

import os
import statistics
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from revmux_vllm import checkpoint
from revmux_vllm.config import RevMuxConfig, layer_limit
from revmux_vllm.rungs import Rung

Prompts = list[list[int]]


class Rated(Protocol):
    """What can be asked how fast it answers."""

    def rate(self, prompts: Prompts, rung: Any) -> float:
        """Requests per second; ``rung`` None for one that has none."""
        ...


def schedule_in_this_process() -> None:
    """Must come before the first import of vLLM, whose log then leaves standard output alone."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"


class Engine:
    """An engine, and how fast it answers at one rung, or at what the load asks for.

    Args:
        model: checkpoint, or backbone alone.
        plain: vLLM's own class that reads ``model``; None for a RevMUX checkpoint.
        options: of ``vllm.LLM``.
    """

    def __init__(self, model: str, plain: str | None, **options: Any) -> None:
        from vllm import LLM

        if plain:
            options["hf_overrides"] = {"architectures": [plain]}
            options["kv_cache_memory_bytes"] = 1 << 30
            options["enable_prefix_caching"] = False  # or repeated rounds are answered from it
        if options.get("load_format") == "dummy":
            options["skip_tokenizer_init"] = True  # such a folder may have none
        self.llm = LLM(model, distributed_executor_backend="mp", **options)

    def rate(self, prompts: Prompts, rungs: Rung | tuple[Rung, ...] | None) -> float:
        """Requests per second: at one rung, by load among several, or None of plain vLLM."""
        from vllm import TokensPrompt

        if rungs is not None:
            self._run_at(rungs)
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        start = time.perf_counter()
        self.llm.classify(inputs, use_tqdm=False)
        return len(prompts) / (time.perf_counter() - start)

    def _run_at(self, rungs: Rung | tuple[Rung, ...]) -> None:
        """Give the scheduler its policy; ``Rung()`` is the backbone alone."""
        from revmux_vllm.engine.policy import ByLoad, Fixed, Options

        core: Any = self.llm.llm_engine.engine_core
        scheduler = core.engine_core.scheduler
        if isinstance(rungs, Rung):
            scheduler.mux_policy = Fixed(scheduler.revmux.kind(rungs))
        else:
            budgets = scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs
            options = Options(rungs=rungs)
            scheduler.mux_policy = ByLoad(scheduler.revmux, options, scheduler.costs, *budgets)

    def close(self) -> None:
        """End the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()


Contender = tuple[Hashable, Rated, Rung | tuple[Rung, ...] | None]


def measure(
    contenders: Sequence[Contender], prompts: Prompts, rounds: int, progress: Progress
) -> dict[Any, list[float]]:
    """Requests per second of every contender in every round, by name, after one round to warm up.

    Args:
        contenders: name, what is asked, and at which rung; asked in this order and in the reverse
            one by turns.
    """
    task = progress.add_task("measuring", total=(rounds + 1) * len(contenders))
    rates: dict[Any, list[float]] = {name: [] for name, *_ in contenders}
    for turn in range(rounds + 1):
        for name, rated, rung in contenders if turn % 2 else reversed(contenders):
            rates[name].append(rated.rate(prompts, rung))
            progress.advance(task)
    return {name: own[1:] for name, own in rates.items()}


def compare(
    folder: Path,
    config: RevMuxConfig,
    values: Mapping[str, Any],
    prompts: Prompts,
    *,
    rungs: Sequence[Rung],
    rounds: int,
    console: Console,
    **options: Any,
) -> dict[str, Any]:
    """Measure a checkpoint against its backbone alone.

    Args:
        folder, config, values: as ``settings.read_model`` gives them.
        prompts: token ids.
        rungs: of the checkpoint's, those to measure.
        options: of both engines; ``dtype`` is among them.

    Returns:
        What ``revmux bench offline --json`` prints.
    """
    schedule_in_this_process()
    longest = max(map(len, prompts))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        progress = stack.enter_context(Progress(console=console))
        starting = progress.add_task("starting two engines", total=2)
        plain_folder = checkpoint.plain_backbone(folder, scratch)
        plain_name = values["architectures"][0].removeprefix("RevMux")
        engines = []
        for model, plain in ((str(folder), None), (plain_folder, plain_name)):
            engines.append(Engine(model, plain, max_model_len=longest, **options))
            stack.callback(engines[-1].close)
            progress.advance(starting)
        by_load = tuple(rung for rung in rungs if not rung.exit)
        contenders: list[Contender] = [(rung, engines[0], rung) for rung in rungs]
        contenders += [("load", engines[0], by_load), ("plain", engines[1], None)]
        rates = measure(contenders, prompts, rounds, progress)
    cut, layers = config.prefill_layers, checkpoint.backbone_shape(dict(values))[1]
    rows = [summary(rates[rung], rates["plain"], rung, cut, layers) for rung in rungs]
    widest = max((Rung(), *by_load), key=lambda rung: rung.saving)
    rows.append(summary(rates["load"], rates["plain"], widest, cut, layers) | {"rung": "load"})
    return as_report(prompts, rounds, options["dtype"], rates["plain"], rows)


def summary(
    rates: list[float], plain: list[float], rung: Rung, cut: int, layers: int
) -> dict[str, Any]:
    """Median and spread of one rung against plain vLLM, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(rates, plain, strict=True)]
    limit = layer_limit(rung.saving, cut, layers)
    return {
        "rung": str(rung),
        "prefill_layers": cut,
        "requests_per_s": statistics.median(rates),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratios": ratios,
        "layer_limit": limit,
        "ratio_over_limit": statistics.median(ratios) / limit,
    }


def as_report(
    prompts: Prompts, rounds: int, dtype: str, plain: list[float], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """``rows`` of ``summary`` and what they have in common."""
    return {
        "requests": len(prompts),
        "mean_tokens": statistics.mean(map(len, prompts)),
        "rounds": rounds,
        "dtype": dtype,
        "baseline": "plain vLLM",
        "plain_requests_per_s": statistics.median(plain),
        "configurations": rows,
    }
