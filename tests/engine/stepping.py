"""vLLM's real scheduler under a plan, step by step, without an engine: the model is faked."""

import time
from pathlib import Path
from typing import Any

import torch
from lone_scheduler import BLOCK_TOKENS
from vllm import PoolingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from revmux_vllm.engine.scheduler import RevMuxScheduler
from revmux_vllm.engine.stages import LOWER, UPPER, StepTimes

MAX_TOKENS, MAX_REQUESTS, LONGEST, NUM_BLOCKS = 128, 12, 64, 100
LONGER = 300
"""Tokens of a prompt that three steps are needed for."""
LONGER_BLOCKS = 22
"""Pages that it needs, and the null page, and a few beside."""


def vllm_config(folder: Path, priority: bool = False, **options: Any) -> VllmConfig:
    return EngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=LONGER,
        max_num_batched_tokens=MAX_TOKENS,
        max_num_seqs=MAX_REQUESTS,
        scheduling_policy="priority" if priority else "fcfs",
        additional_config={"revmux": {"min_agreement": 0} | options},
    ).create_engine_config()


init_none_hash(sha256)


def request(
    name: str, prompt: int | list[int], salt: str | None = None, priority: int = 0
) -> Request:
    """A prompt of these tokens, or of so many that are like no other's."""
    ids = prompt if isinstance(prompt, list) else [1000 + int(name)] * prompt
    return Request(
        request_id=name,
        prompt_token_ids=ids,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
        sampling_params=None,
        pooling_params=PoolingParams(task="classify"),
        cache_salt=salt,
        priority=priority,
        arrival_time=time.time(),
    )


def computed_tokens(output: Any) -> dict[str, int]:
    """Of every request that runs, the tokens that earlier steps have computed."""
    cached = output.scheduled_cached_reqs
    before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return before | {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}


def run_model(
    output: Any, requests: dict[str, Request], is_timed: bool = True, seconds_per_row: float = 1e-4
) -> ModelRunnerOutput:
    """What the worker would answer: to every request its own name, in numbers.

    Where tokens of it are left to compute it is None.
    """
    names = list(output.num_scheduled_tokens)
    before = computed_tokens(output)
    done = {
        name: before[name] + output.num_scheduled_tokens[name] == requests[name].num_tokens
        for name in names
    }
    answer = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        pooler_output=[torch.tensor([float(name)]) if done[name] else None for name in names],
    )
    tokens = output.total_num_scheduled_tokens
    if tokens and is_timed:
        rows = sum(output.num_scheduled_tokens[group[0]] for group in output.mux_plan.groups)
        seconds = {LOWER: tokens * seconds_per_row, UPPER: 3 * rows * seconds_per_row}
        answer.revmux_times = [StepTimes(tokens, rows, seconds)]  # type: ignore[attr-defined]
    return answer


def step(scheduler: RevMuxScheduler) -> tuple[Any, dict[str, float]]:
    """One step: its plan, and the answers."""
    output: Any = scheduler.schedule()
    outputs = scheduler.update_from_output(output, run_model(output, scheduler.requests))
    answers = {
        answer.request_id: answer.pooling_output.item()
        for batch in outputs.values()
        for answer in batch.outputs
    }
    return output.mux_plan, answers


def drain(scheduler: RevMuxScheduler) -> list[Any]:
    plans = []
    while scheduler.has_unfinished_requests():
        plans.append(step(scheduler)[0])
        assert plans[-1].groups, "idle while requests wait"
    return plans
