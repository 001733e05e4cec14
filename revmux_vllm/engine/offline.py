"""An engine in this process whose packing is known, to measure accuracy through vLLM.

All requests of a window wait together before the first step, so the scheduler packs them as
``pack`` does for the reference: the two must give the same answers.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revmux_vllm.backbones.base import two_class_logits
from revmux_vllm.engine.policy import Fixed
from revmux_vllm.rungs import Rung
from revmux_vllm.training.data import LabelledText
from revmux_vllm.training.features import tokenize


class OfflineEngine:
    """Classes of ``texts`` under the groupings of an evaluation.

    Args:
        folder: checkpoint whose family the engine serves.
        tokenizer: the backbone's.
        texts: what the reference was given.
        max_tokens: longer texts are cut, as for the reference.
        window: most requests that wait together.

    Raises:
        ValueError: without vLLM.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, texts: LabelledText, max_tokens: int, window: int
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # standard output is the report's
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(f"--engine: {error}; tools/install.sh installs vLLM") from error
        self.prompts: list[list[int]] = tokenize(tokenizer, texts, max_tokens)["input_ids"]
        longest = max(map(len, self.prompts))
        self.llm = LLM(
            str(folder),
            dtype="float32",  # as the reference computes
            enforce_eager=True,
            distributed_executor_backend="mp",
            max_model_len=longest,
            max_num_seqs=window,
            max_num_batched_tokens=window * longest,
        )
        core: Any = self.llm.llm_engine.engine_core
        self.scheduler = core.engine_core.scheduler

    def classes(self, rung: Rung, groups: Any, parts: Sequence[Any]) -> Tensor:
        """Classes (B,) at ``rung``; each of ``parts`` waits together."""
        from vllm import PoolingParams, TokensPrompt

        self.scheduler.mux_policy = Fixed(self.scheduler.revmux.kind(rung))
        params = PoolingParams(use_activation=False)  # logits, as the reference compares them
        answers = torch.empty(len(self.prompts), dtype=torch.long)
        for rows in parts:
            inputs = [TokensPrompt(prompt_token_ids=self.prompts[row]) for row in rows]
            outputs = self.llm.classify(inputs, pooling_params=params, use_tqdm=False)
            for row, output in zip(rows, outputs, strict=True):
                logits = torch.tensor(output.outputs.probs)[None]
                answers[row] = two_class_logits(logits).argmax()
        return answers
