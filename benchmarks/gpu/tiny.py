"""Tiny random checkpoints whose answers depend strongly on who shares a composite.

As in the project's tests: weights far from any start, so that a mistake in grouping, stream,
position, page or slot cannot hide behind the tolerance.
"""

import random
from pathlib import Path
from typing import Any

from gpu.shapes import RUNGS
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung

VOCAB_SIZE = 320
HIDDEN_SIZE = 128
LONGEST = 300
ALL_RUNGS = (*RUNGS, Rung(exit=True))


def write_checkpoint(root: Path, family: str) -> Path:
    """A checkpoint of a random LLaMA or BERT in float32; its backbone is in ``root / "backbone"``.

    Returns:
        The folder of the checkpoint.
    """
    import torch

    from revmux_vllm import checkpoint
    from revmux_vllm.adapters.kinds import AdapterLadder

    torch.manual_seed(0)
    _write_backbone(root / "backbone", family)
    ladder = AdapterLadder(RevMuxConfig(ALL_RUNGS, 1, adapter_hidden_size=48), HIDDEN_SIZE)
    with torch.no_grad():
        for parameter in ladder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    folder = root / "checkpoint"
    checkpoint.save(folder, ladder, root / "backbone", "# tiny\n", bundle_backbone=True)
    return folder


def _write_backbone(folder: Path, family: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 1.6 / HIDDEN_SIZE**0.5,
        "pad_token_id": 0,
        "num_labels": 3,
    }
    if family == "llama":
        values |= {"num_key_value_heads": 1, "head_dim": HIDDEN_SIZE // 2}
    config = AutoConfig.for_model(family, **values)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def random_prompts(seed: int, count: int) -> list[list[int]]:
    """Token ids of unequal lengths from 1 to ``LONGEST``; 0 is padding and in none of them."""
    rng = random.Random(seed)
    lengths = [
        rng.choice([1, 2, rng.randint(1, 30), rng.randint(1, LONGEST)]) for _ in range(count)
    ]
    return [[rng.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in lengths]
