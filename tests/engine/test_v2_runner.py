"""vLLM's V2 model runner, the default on GPUs, gives the same answers: run on a CPU.

Triton's interpreter stands in for a GPU (``v2_on_cpu/sitecustomize.py``), in a pytest of its own,
because vLLM reads its environment once in a process. What it runs are the parity tests themselves.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ByCrowd, RecordingEngine, make_tiny_checkpoint, random_prompts
from contracts import UNDER_CONTRACT, Promised, check_contract
from test_parity import ALL, FLOAT32_TOLERANCE, MIXED, reference_of

from revmux_vllm.rungs import parse_rungs

HERE = Path(__file__).parent
V2 = {
    "PYTHONPATH": str(HERE / "v2_on_cpu"),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # A compiler would generate code for the backend that is not there.
    "TORCHDYNAMO_DISABLE": "1",
}
inside = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def pytest_with_v2(*arguments: str) -> str:
    """Run tests under the V2 runner; what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, env=os.environ | V2, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(not inside, reason="runs in the pytest that test_one_mixed_step starts")
def test_inside_mixed_step(tmp_path: Path, make_engine: Callable[..., RecordingEngine]) -> None:
    folder = make_tiny_checkpoint(tmp_path, rungs=ALL)
    promised = Promised(folder)
    engine, reference = make_engine(folder, **UNDER_CONTRACT), reference_of(folder)
    assert engine.llm.llm_engine.vllm_config.use_v2_model_runner
    engine.planner.policy = ByCrowd(parse_rungs(MIXED.split(",")))
    prompts = random_prompts(3, 13, longest=40)
    probs, groups, rungs = engine.answers(prompts)
    assert {str(rung) for rung in rungs} == {"merge:2", "mux:8", "mux:4"}
    assert (probs - reference(prompts, groups, rungs)).abs().max() <= FLOAT32_TOLERANCE
    # vLLM's asynchronous output hides what is set on it; the times arrive all the same.
    assert engine.planner.costs.known
    check_contract(engine, promised, batches=[(2, 48)])
    engine.planner.policy = ByCrowd(())
    alone, groups, rungs = engine.answers(prompts[:3])
    assert {str(rung) for rung in rungs} == {"alone"}
    torch.testing.assert_close(alone, reference(prompts[:3], groups, rungs), rtol=0, atol=1e-5)


def test_one_mixed_step() -> None:
    out = pytest_with_v2(f"{__file__}::test_inside_mixed_step")
    assert "1 passed" in out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_parity_matrix() -> None:
    """All but compiled layers."""
    out = pytest_with_v2(
        str(HERE / "test_parity.py"), "-m", "slow or not slow", "-k", "not test_compiled"
    )
    assert "failed" not in out
    assert "passed" in out
