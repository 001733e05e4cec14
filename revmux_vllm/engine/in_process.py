"""An engine whose scheduler is in this process: its policy can be chosen and its plans be seen.

For measuring: accuracy through vLLM, throughput rung by rung, batch jobs, and the tests. Plain
vLLM, which such an engine is compared with, runs in a process of its own (``plain.py``).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revmux_vllm.engine.environment import check_plugins, set_inside
from revmux_vllm.engine.platform import native_dtype
from revmux_vllm.planning.options import Options
from revmux_vllm.planning.planner import StepPlanner
from revmux_vllm.planning.policy import ByLoad
from revmux_vllm.rungs import Rung

Prompt = str | Sequence[int]
"""A text, or token ids."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the caller's
}


def chosen_dtype(dtype: str) -> str:
    """``dtype``, and for ``auto`` the one that this machine computes in (``native_dtype``).

    Asking may be the first import of vLLM, which settles how it logs: errors alone, as an engine
    of this module does.
    """
    with set_inside(_variables(quiet=True)):
        return native_dtype() if dtype == "auto" else dtype


def _variables(quiet: bool) -> dict[str, str]:
    """What vLLM must find in the environment while it is imported and an engine starts."""
    level = {"VLLM_LOGGING_LEVEL": "ERROR"}
    return ENVIRONMENT | (level if quiet and "VLLM_LOGGING_LEVEL" not in os.environ else {})


class InProcessEngine:
    """``vllm.LLM`` of a checkpoint, or of a backbone alone.

    Args:
        model: checkpoint folder, or any model that vLLM classifies with.
        quiet: of vLLM's log only errors, unless ``VLLM_LOGGING_LEVEL`` says otherwise.
        options: of ``vllm.LLM``.

    Attributes:
        llm: vLLM's own object.
    """

    def __init__(self, model: str | Path, *, quiet: bool = True, **options: Any) -> None:
        check_plugins()
        with set_inside(_variables(quiet)):
            from vllm import LLM

            # Workers in processes of their own, as under a server.
            self.llm = LLM(str(model), **{"distributed_executor_backend": "mp", **options})

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler; of a RevMUX checkpoint a ``RevMuxScheduler``."""
        core: Any = self.llm.llm_engine.engine_core
        return core.engine_core.scheduler

    @property
    def planner(self) -> StepPlanner:
        """Of a RevMUX checkpoint."""
        planner: StepPlanner = self.scheduler.planner
        return planner

    def run_at(self, rungs: Rung | tuple[Rung, ...]) -> None:
        """From now on run at one rung, ``Rung()`` being the backbone alone, or by load at several.

        Every rung of the checkpoint may be named, also where its options leave it out.
        """
        planner = self.planner
        if isinstance(rungs, Rung):
            planner.fix(planner.config.kind(rungs))
        else:
            options = Options(rungs=rungs)
            planner.policy = ByLoad(planner.config, options, planner.costs, planner.budgets)

    def classify(
        self,
        prompts: Sequence[Prompt],
        *,
        salts: Sequence[str] | None = None,
        logits: bool = False,
        cut: bool = False,
    ) -> list[Any]:
        """vLLM's outputs for ``prompts``, which all wait together before the first step.

        Args:
            prompts: texts or token ids.
            salts: the ``cache_salt`` of each.
            logits: in place of probabilities.
            cut: texts to as many tokens as the model takes; otherwise vLLM refuses longer ones.
        """
        from vllm import PoolingParams, TextPrompt, TokensPrompt

        inputs: list[Any] = []
        for i, prompt in enumerate(prompts):
            text = isinstance(prompt, str)
            one: Any = TextPrompt(prompt=prompt) if text else TokensPrompt(prompt_token_ids=prompt)
            inputs.append(one | {"cache_salt": salts[i]} if salts else one)
        more: dict[str, Any] = {}
        if logits:
            more["pooling_params"] = PoolingParams(use_activation=False)
        if cut:
            more["tokenization_kwargs"] = {"truncate_prompt_tokens": -1}
        return self.llm.classify(inputs, use_tqdm=False, **more)

    def close(self) -> None:
        """End the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()
