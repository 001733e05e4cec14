"""A prompt longer than a step runs alone, in chunks, as in plain vLLM; composites run whole."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from async_scheduling import scheduling
from conftest import SMALL, RecordingEngine, make_tiny_checkpoint, random_prompts
from lone_scheduler import lone_scheduler
from stepping import LONGER, MAX_TOKENS, NUM_BLOCKS, request, run_model, vllm_config
from test_parity import FLOAT32_TOLERANCE, Reference, reference_of
from vllm import PoolingParams, TokensPrompt
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.request import RequestStatus

from revmux_vllm import checkpoint
from revmux_vllm.engine.metrics import take_counts
from revmux_vllm.engine.plain import PlainEngine
from revmux_vllm.rungs import Rung

STEP_TOKENS = 64
"""Of the engine's steps; the prompts have up to 300 tokens."""


def answered(scheduler: Any, output: Any) -> Counter[tuple[str, str]]:
    """What was counted, once the output of a step was there."""
    outputs = scheduler.update_from_output(output, run_model(output, scheduler.requests))
    return take_counts(next(iter(outputs.values())).scheduler_stats)


@pytest.fixture
def scheduler(tiny_checkpoint: Path) -> Any:
    return lone_scheduler(vllm_config(tiny_checkpoint, policy="fixed:4"), NUM_BLOCKS)


def test_it_runs_in_its_turn_and_is_counted_once(scheduler: Any) -> None:
    for i, length in enumerate([20, 20, 20, 20, LONGER, 20]):
        scheduler.add_request(request(str(i), length))
    chunks: list[int] = []
    for groups in ((("0", "1", "2", "3"),), *[(("4",),)] * 3, (("5",),)):
        output = scheduler.schedule()
        assert output.mux_plan.groups == groups
        counted = answered(scheduler, output)
        if groups != (("4",),):
            assert counted["requests", "mux:4"] + counted["requests", "alone"] == len(groups[0])
            continue
        assert output.mux_plan.all_alone
        chunks.append(output.num_scheduled_tokens["4"])
        is_last = sum(chunks) == LONGER
        assert counted["requests", "alone"] == counted["fallbacks", "long"] == int(is_last)
        assert counted["us", "backbone"] == counted["us", "step"], "it is the backbone alone"
        assert counted["now", "waiting"] == LONGER - sum(chunks) + 20, "its further chunks wait"
    assert chunks == [MAX_TOKENS, MAX_TOKENS, LONGER - 2 * MAX_TOKENS]
    assert not scheduler.has_unfinished_requests()


def test_its_chunks_tell_nothing_of_what_rows_cost(scheduler: Any) -> None:
    """They attend to all that came before, so they would make short texts look dear."""
    scheduler.add_request(request("0", 100))
    answered(scheduler, scheduler.schedule())
    before = scheduler.planner.costs.per_layer()
    scheduler.add_request(request("1", LONGER))
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        slow = run_model(output, scheduler.requests, seconds_per_row=1.0)
        scheduler.update_from_output(output, slow)
    assert scheduler.planner.costs.per_layer() == before


def test_one_that_goes_in_mid_way_leaves_the_step_to_others(scheduler: Any) -> None:
    for i, length in enumerate([LONGER, 20, 20]):
        scheduler.add_request(request(str(i), length))
    answered(scheduler, scheduler.schedule())
    scheduler.reset_prefix_cache(reset_running_requests=True)  # it is preempted
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"0": MAX_TOKENS}, "it begins anew, being the oldest"
    answered(scheduler, output)
    scheduler.finish_requests("0", RequestStatus.FINISHED_ABORTED)
    output = scheduler.schedule()
    assert output.mux_plan.groups == (("1", "2"),)
    answered(scheduler, output)
    assert scheduler.kv_cache_manager.usage == 0


def test_members_that_vllm_cuts_share_nothing(scheduler: Any) -> None:
    """No option that we allow makes it cut them; if one did, answers must stay right."""
    scheduler.scheduler_config.long_prefill_token_threshold = 16
    for i in range(4):
        scheduler.add_request(request(str(i), 20))
    scheduled = []
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        assert output.mux_plan.all_alone
        scheduled.append(dict(output.num_scheduled_tokens))
        answered(scheduler, output)
    assert scheduled == [dict.fromkeys("0123", 16), dict.fromkeys("0123", 4)]


def check_chunks(engine: RecordingEngine, prompts: list[list[int]]) -> None:
    """Every prompt ran in as few steps as it needs, and where it needs several, by itself."""
    steps = [plan.groups for plan in engine.plans if plan is not None and plan.groups]
    times = Counter(name for groups in steps for group in groups for name in group)
    for name, number in times.items():
        length = len(prompts[int(name.split("-")[0]) % len(prompts)])
        assert number == -(-length // STEP_TOKENS)
        assert number == 1 or steps.count(((name,),)) == number


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])  # windows: none, all, some
def test_an_engine_with_short_steps(
    family: str, tmp_path: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    """Its answers are the reference's, and those of long prompts plain vLLM's."""
    options: dict[str, Any] = {"max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": 16}
    folder = make_tiny_checkpoint(tmp_path, family=family)
    engine, reference = make_engine(folder, **options), reference_of(folder)
    engine.run_at(Rung(mux=4))
    (tmp_path / "plain").mkdir()
    backbone = checkpoint.plain_backbone(folder, tmp_path / "plain")
    plain = PlainEngine(backbone, **SMALL, **options, enable_prefix_caching=False)
    seen: set[str] = set()
    try:
        for seed in range(3):
            prompts = random_prompts(seed, 40)
            probs, groups, rungs = engine.answers(prompts)
            check_chunks(engine, prompts)
            once = dict(zip(groups, rungs, strict=True))
            assert sorted(i for group in once for i in group) == list(range(len(prompts)))
            seen |= set(map(str, rungs))
            expected = reference(prompts, list(once), list(once.values()))
            assert (probs - expected).abs().max() <= FLOAT32_TOLERANCE
            long = [i for i, prompt in enumerate(prompts) if len(prompt) > STEP_TOKENS]
            theirs = torch.tensor(plain.probabilities([prompts[i] for i in long]))
            torch.testing.assert_close(probs[long], theirs, rtol=0, atol=1e-6)
        assert seen == {"alone", "mux:2", "mux:4"}
    finally:
        plain.close()
    check_going(engine, reference)


@pytest.mark.slow
def test_two_steps_in_flight(
    tiny_checkpoint: Path,
    make_engine: Callable[..., RecordingEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with ``--async-scheduling``, which vLLM's CPU platform turns off by itself."""
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", scheduling(is_async=True))
    options: dict[str, Any] = {"max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": 16}
    engine = make_engine(tiny_checkpoint, **options, async_scheduling=True)
    core: Any = engine.llm.llm_engine.engine_core
    assert core.engine_core.batch_queue_size == 2
    reference = reference_of(tiny_checkpoint)
    engine.run_at(Rung(mux=4))
    for seed in range(3):
        prompts = random_prompts(seed, 40)
        probs, groups, rungs = engine.answers(prompts)
        check_chunks(engine, prompts)
        once = dict(zip(groups, rungs, strict=True))
        assert Rung(mux=4) in once.values()
        expected = reference(prompts, list(once), list(once.values()))
        assert (probs - expected).abs().max() <= FLOAT32_TOLERANCE


def check_going(engine: RecordingEngine, reference: Reference) -> None:
    """Of three long prompts one is aborted after a chunk, and one starts anew."""
    prompts = [*random_prompts(9, 8, longest=20), [7] * 200, [8] * 200, [9] * 200]
    vllms = engine.llm.llm_engine
    for i, prompt in reversed(list(enumerate(prompts))):  # the long ones first
        text = TokensPrompt(prompt_token_ids=prompt)
        vllms.add_request(str(i), text, PoolingParams(task="classify"))
    outputs = vllms.step()
    vllms.abort_request(["10"])
    outputs += vllms.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.plans.clear()
    while vllms.has_unfinished_requests():
        outputs += vllms.step()
    answers = {int(output.request_id): output.outputs.data for output in outputs}
    assert sorted(answers) == list(range(10)), "each once, but the aborted one"
    assert len(outputs) == 10
    groups = {
        tuple(int(name.partition("-")[0]) for name in group): rung
        for plan in engine.plans
        for rung, group in zip(plan.rungs, plan.groups, strict=True)
    }
    expected = reference(prompts[:10], list(groups), list(groups.values()))
    probs = torch.stack([answers[i] for i in range(10)])
    assert (probs - expected).abs().max() <= FLOAT32_TOLERANCE
