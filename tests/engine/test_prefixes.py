"""Shared prefixes in the cache: the answers are the reference's, whoever computed the prefix.

One engine runs at all rungs by turns, so what one of them left another would find if it could.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ByCrowd, RecordingEngine, make_tiny_checkpoint
from contracts import UNDER_CONTRACT, Promised
from test_parity import ALL, FLOAT32_TOLERANCE, reference_of, sharing_prompts

from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.training.contract import walk

BLOCK = 32
CACHING: dict[str, Any] = {"enable_prefix_caching": True, "block_size": BLOCK}
KINDS = [
    "",
    "mux:2,mux:4,mux:8",
    "merge:2",
    "merge:3,merge:3+mux:2,merge:3+mux:4",
    "exit@3,mux:2@2,mux:4@3",
    "merge:2@2,merge:3+mux:2@3",
    "mux:2,exit",
]
BATCHES = [(0, 2), (1, 5), (2, 64), (3, 31), (2, 64), (5, 2)]  # seed, requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("prefixes"), rungs=ALL)


@pytest.fixture(scope="module")
def promised(folder: Path) -> Promised:
    return Promised(folder)


@pytest.fixture(scope="module")
def engine(folder: Path, promised: Promised) -> Iterator[RecordingEngine]:
    engine = RecordingEngine(folder, **CACHING, **UNDER_CONTRACT)
    yield engine
    engine.close()


@pytest.mark.parametrize("kind", [*KINDS, *reversed(KINDS)])
def test_parity(kind: str, engine: RecordingEngine, folder: Path) -> None:
    reference = reference_of(folder)
    engine.planner.policy = ByCrowd(parse_rungs(kind.split(",")) if kind else ())
    cached = 0
    for seed, count in BATCHES:
        prompts = sharing_prompts(seed, count)
        probs, groups, rungs = engine.answers(prompts)
        cached += engine.cached_tokens
        assert sorted(i for group in groups for i in group) == list(range(count))
        difference = (probs - reference(prompts, groups, rungs)).abs().max().item()
        assert difference <= FLOAT32_TOLERANCE, (seed, count, rungs)
    assert cached > 1000


def test_under_a_contract_what_ran_alone_is_found(
    engine: RecordingEngine, promised: Promised
) -> None:
    engine.planner.fix((Rung(sure=True),))
    alone = cached = 0
    for seed, count in (10, 1), (11, 48), (12, 64), (11, 48):
        prompts = sharing_prompts(seed, count)
        salts = ["exact" if i % 7 == 3 else f"tenant-{i % 2}" for i in range(count)]
        probs, groups, rungs = engine.answers(prompts, salts)
        cached += engine.cached_tokens
        seen = promised.seen(prompts)
        left = walk(promised.contract, seen)
        ran = {group[0]: rung for group, rung in zip(groups, rungs, strict=True)}
        is_alone = torch.tensor([ran[i] == Rung() for i in range(count)])
        alone += int(is_alone.sum())
        expected = torch.where(is_alone[:, None], seen.own, left.answers).softmax(-1)
        sure = ~promised.close(seen) | is_alone
        difference = (probs - expected).abs().amax(-1)[sure].max().item()
        assert difference <= FLOAT32_TOLERANCE, (seed, count)
    assert cached > 1000
    assert 161 / 7 < alone < 161 / 2, "exact ones, and one for each of a few prefixes"


def test_tenants_share_no_prefix(engine: RecordingEngine) -> None:
    engine.planner.policy = ByCrowd((Rung(2),))
    prompts = [[9] * 200] * 2
    for _ in range(2):
        engine.answers(prompts, ["a", "a"])
    assert engine.cached_tokens == 2 * 192
    engine.answers(prompts, ["b", "c"])
    assert engine.cached_tokens == 0
