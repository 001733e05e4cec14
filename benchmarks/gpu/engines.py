"""The engines that are compared: each in a child of the kit, asked in the same way.

Prompts are token ids, which wait in the engine's own process: what is measured is the engine with
vLLM's own handling of a request, without HTTP, tokenising and the API server.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.rungs import Rung

Rungs = Rung | tuple[Rung, ...] | None
"""One rung, what the load asks for among several, or None for an engine without rungs."""


def engine_options(
    is_gpu: bool, memory_share: float, enforce_eager: bool, **more: Any
) -> dict[str, Any]:
    """Options of ``vllm.LLM`` for an engine that shares its device with another.

    Args:
        is_gpu: otherwise the cache is small, for vLLM would take most of the memory.
        memory_share: of the GPU's memory. RevMUX needs no more cache than a step fills; plain vLLM
            takes what its share has left.
        enforce_eager: neither compile nor capture graphs.
        more: win over these.
    """
    shared: dict[str, Any] = {"gpu_memory_utilization": memory_share}
    if not is_gpu:
        shared = {"kv_cache_memory_bytes": 128 << 20}
    # Prompts are token ids.
    return {"enforce_eager": enforce_eager, "skip_tokenizer_init": True, **shared, **more}


class Recorder:
    """Keeps the plan of every step that an engine of RevMUX's runs."""

    def __init__(self, engine: InProcessEngine) -> None:
        self.plans: list[Any] = []
        scheduler = engine.scheduler
        schedule = scheduler.schedule

        def recording(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            plan = getattr(output, "mux_plan", None)
            if plan is not None:
                self.plans.append(plan)
            return output

        scheduler.schedule = recording

    def requests_by_rung(self) -> dict[str, int]:
        """How many requests ran at every rung."""
        counts: Counter[str] = Counter()
        for plan in self.plans:
            for rung, group in zip(plan.rungs, plan.groups, strict=True):
                counts[str(rung)] += len(group)
        return dict(sorted(counts.items()))


class Served:
    """An engine, timed where it runs.

    Args:
        model: folder of a checkpoint, or of a backbone alone.
        options: of ``vllm.LLM``.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.engine = InProcessEngine(model, quiet=False, **options)
        self._number = 0
        self._recorder: Recorder | None = None

    def seconds(self, rungs: Rungs, prompts: Sequence[Sequence[int]]) -> float:
        """How long it takes to answer ``prompts``, which all wait at once."""
        if rungs is not None:
            self.engine.run_at(rungs)
        start = time.perf_counter()
        self.engine.classify(prompts)
        return time.perf_counter() - start

    def latencies(
        self, rungs: Rungs, prompts: Sequence[Sequence[int]], number: int, gap_s: float
    ) -> tuple[list[float], dict[str, int]]:
        """Answer requests that arrive one after the other at even gaps, whatever waits.

        Args:
            rungs: what may run.
            prompts: asked over and over.
            number: of requests.
            gap_s: from one arrival to the next.

        Returns:
            Seconds from the time at which each request was due to its answer, in the order of the
            answers; and how many requests ran at every rung, empty for plain vLLM.
        """
        from vllm import PoolingParams
        from vllm.inputs import tokens_input

        if rungs is not None:
            self.engine.run_at(rungs)
            if self._recorder is None:
                self._recorder = Recorder(self.engine)
            self._recorder.plans.clear()
        llm = self.engine.llm.llm_engine
        inputs = [tokens_input(list(prompt)) for prompt in prompts]
        params = PoolingParams(task="classify")
        first = self._number
        self._number += number

        def arrive(i: int) -> None:
            llm.add_request(f"quarter-{first + i}", inputs[i % len(inputs)], params)

        def answered() -> list[int]:
            finished = [output for output in llm.step() if output.finished]
            return [int(output.request_id.split("-")[1]) - first for output in finished]

        latencies = run_evenly(arrive, answered, number, gap_s)
        return latencies, self._recorder.requests_by_rung() if self._recorder else {}

    def facts(self) -> dict[str, Any]:
        """What the engine runs on: vLLM's choices, and dtypes and attention in the worker."""
        config = self.engine.llm.llm_engine.vllm_config
        cache = config.cache_config
        return {
            "model_runner": "V2" if config.use_v2_model_runner else "V1",
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
            "compilation_mode": int(config.compilation_config.mode),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "block_size": cache.block_size,
            "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
            "num_gpu_blocks": cache.num_gpu_blocks,
            **self.engine.llm.apply_model(model_facts)[0],
        }

    def close(self) -> None:
        """End the engine's processes."""
        self.engine.close()


def run_evenly(
    arrive: Callable[[int], None],
    answered: Callable[[], list[int]],
    number: int,
    gap_s: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[float]:
    """Let ``number`` requests arrive ``gap_s`` apart; seconds from when each was due to its answer.

    Args:
        arrive: request i comes. One that is due while a step runs comes behind it, as it would
            wait in an engine's queue, and its latency counts from when it was due.
        answered: run a step; the requests that it answered.
        number: of requests.
        gap_s: between them.
        clock: seconds.
        sleep: for seconds.
    """
    latencies: list[float] = []
    began, arrived = clock(), 0
    while len(latencies) < number:
        while arrived < number and began + arrived * gap_s <= clock():
            arrive(arrived)
            arrived += 1
        if len(latencies) == arrived:  # nothing is under way
            sleep(max(0.0, began + arrived * gap_s - clock()))
            continue
        done = answered()
        latencies += [clock() - began - i * gap_s for i in done]
    return latencies


def model_facts(model: Any) -> dict[str, Any]:
    """Of the model in the worker: attention backends, and dtypes of backbone and adapters."""
    backends = {
        module.attn_backend.get_name()
        for module in model.modules()
        if hasattr(module, "attn_backend")
    }
    dtypes: dict[str, set[str]] = {"backbone": set(), "adapters": set()}
    for name, parameter in model.named_parameters():
        part = "adapters" if name.startswith("adapters.") else "backbone"
        dtypes[part].add(str(parameter.dtype).removeprefix("torch."))
    return {"attention": sorted(backends)} | {
        f"{part}_dtypes": sorted(found) for part, found in dtypes.items()
    }
