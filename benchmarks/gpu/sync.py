"""Whether the host waits for the device in a step: vLLM's own check, on our code.

``VLLM_GPU_SYNC_CHECK`` (vllm/utils/gpu_sync_debug.py) is read when a worker's code is imported and
arms itself after warm-up, for ``execute_model`` and ``sample_tokens`` of vLLM's GPU worker, under
both model runners: with ``error`` a step that waits raises, with ``warn`` it prints where.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from gpu.child import ChildError, log_tail, run_in_child
from gpu.results import FAIL, NUMBER, PASS, Outcome, Skipped
from gpu.tiny import ALL_RUNGS, random_prompts, write_checkpoint
from revmux_vllm.engine.in_process import InProcessEngine

VARIABLE = "VLLM_GPU_SYNC_CHECK"
NO_GPU = f"{VARIABLE} checks CUDA devices alone; the run itself was made"
_PLACE = re.compile(r"([\w./+-]+\.py):(\d+): \w*Warning: .*(?:synchronizing CUDA|non_blocking)")


def run_steps(options: dict[str, Any], ours: bool) -> dict[str, Any]:
    """Steps at every rung, alone and mixed, or of plain vLLM. Runs in a child of the kit."""
    with tempfile.TemporaryDirectory(prefix="revmux-sync-") as root:
        folder = write_checkpoint(Path(root), "llama")
        model = folder if ours else Path(root) / "backbone"
        engine = InProcessEngine(model, quiet=False, **options)
        try:
            armed = engine.llm.apply_model(armed_mode)[0]
            prompts, salts = (
                random_prompts(3, 31),
                ["exact" if i % 5 == 4 else "all" for i in range(31)],
            )
            # Twice: what is lazy runs in the first, and a later step may wait elsewhere.
            for rungs in [(), *((rung,) for rung in ALL_RUNGS), ALL_RUNGS[:-1]] if ours else [()]:
                if ours:
                    engine.planner.fix(rungs)
                for _ in range(2):
                    engine.classify(prompts, salts=salts)
        finally:
            engine.close()
    return {"armed": armed}


def armed_mode(model: Any) -> str | None:
    """In the worker: the mode of the check, None where it is not armed."""
    from vllm.utils import gpu_sync_debug

    mode: str | None = gpu_sync_debug._SYNC_CHECK_MODE
    return mode if gpu_sync_debug._sync_check_enabled else None


def under(
    mode: str, options: dict[str, Any], ours: bool, log: Path, timeout_s: float
) -> dict[str, Any]:
    """``run_steps`` with the check in a mode. Raises ChildError where a step fails."""
    found: dict[str, Any] = run_in_child(
        run_steps, options, ours, log=log, environ={VARIABLE: mode}, timeout_s=timeout_s
    )
    return found


def check_plain(options: dict[str, Any], log: Path, timeout_s: float) -> Outcome:
    """Plain vLLM under the check, to tell its waits from ours."""
    try:
        found = under("error", options, False, log, timeout_s)
    except ChildError as error:
        says = f"plain vLLM fails by itself: {str(error).splitlines()[0]}"
        return Outcome(NUMBER, says, {"error": str(error)})
    return Outcome(NUMBER, "plain vLLM does not wait", found)


def check_ours(options: dict[str, Any], logs: Path, timeout_s: float, is_gpu: bool) -> Outcome:
    """RevMUX under the check; where a step fails, all places that wait, by a run that goes on.

    Raises:
        Skipped: without a GPU, after the run: then it only says that the run works.
    """
    try:
        found = under("error", options, True, logs / "sync-error.log", timeout_s)
    except ChildError as error:
        if not is_gpu:
            raise
        log = logs / "sync-warn.log"
        under("warn", options, True, log, timeout_s)
        return judge_places(places(log_tail(log, 1_000_000)), str(error))
    if not is_gpu:
        raise Skipped(NO_GPU)
    if found["armed"] != "error":
        return Outcome(FAIL, f"the check is not armed: {found['armed']}", found)
    return Outcome(PASS, "no step waits for the device", found)


def places(log: str) -> list[str]:
    """``file:line`` of everything that waited, as the mode ``warn`` prints it, each once."""
    return sorted({f"{path}:{line}" for path, line in _PLACE.findall(log)})


def judge_places(found: list[str], error: str) -> Outcome:
    """Waits of vLLM's own code are not ours; without a place the failure is of another kind."""
    ours = [place for place in found if "/revmux_vllm/" in place]
    details = {"places": found, "error": error}
    if ours:
        return Outcome(FAIL, f"waits at {', '.join(ours)}", details)
    if found:
        return Outcome(PASS, f"only vLLM's own code waits: {', '.join(found)}", details)
    return Outcome(FAIL, f"failed, and nothing waits: {error.splitlines()[0]}", details)
