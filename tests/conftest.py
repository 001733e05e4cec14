"""A tiny random checkpoint, and engines whose plans can be seen."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from revmux_vllm import checkpoint
from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.config import RevMuxConfig

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

VOCAB_SIZE = 320
# Tiny models: more threads only get in one another's way, and in the engine's.
torch.set_num_threads(1)


def random_prompts(seed: int, count: int, longest: int = 300) -> list[list[int]]:
    """Token ids of unequal lengths from 1 to ``longest``, some of them repeated."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        if prompts and rng.random() < 0.15:
            prompts.append(rng.choice(prompts))
            continue
        length = rng.choice([1, 2, rng.randint(1, 30), rng.randint(1, longest)])
        prompts.append([rng.randrange(VOCAB_SIZE) for _ in range(length)])
    return prompts


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of made-up words w0 .. w319."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"w{i}": i for i in range(1, VOCAB_SIZE)} | {"[UNK]": 0}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]", model_max_length=512
    )


def make_tiny_checkpoint(
    root: Path, *, bundle_backbone: bool = True, hidden_size: int = 64, num_layers: int = 4
) -> Path:
    """A random 4-layer backbone with random adapters for widths 2, 4 and 8, all in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        num_labels=3,
    )
    backbone = root / "backbone"
    LlamaForSequenceClassification(config).save_pretrained(backbone)
    word_tokenizer().save_pretrained(backbone)
    ladder = AdapterLadder(
        RevMuxConfig(widths=(2, 4, 8), prefill_layers=1, adapter_hidden_size=48), hidden_size
    )
    with torch.no_grad():  # far from the near-identity start, so that company shows
        for parameter in ladder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    folder = root / "checkpoint"
    checkpoint.save(folder, ladder, backbone, "# tiny\n", bundle_backbone=bundle_backbone)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


class RecordingEngine:
    """``vllm.LLM`` that keeps the plan of every step it ran."""

    def __init__(self, model: Path, **options: Any) -> None:
        from vllm import LLM

        options = {
            "dtype": "float32",
            "enforce_eager": True,
            "distributed_executor_backend": "mp",
            "kv_cache_memory_bytes": 64 << 20,
        } | options
        with pytest.MonkeyPatch.context() as patch:
            # With the scheduler in this process a test can record its plans.
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            self.llm = LLM(model=str(model), **options)
        self.plans: list[Any] = []
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        schedule = scheduler.schedule

        def recording(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.plans.append(getattr(output, "mux_plan", None))
            return output

        scheduler.schedule = recording

    def classify(
        self, prompts: list[list[int]], **options: Any
    ) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        """Probabilities (B, C), and the groups that they were computed in."""
        from vllm import TokensPrompt

        self.plans.clear()
        outputs = self.llm.classify(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            use_tqdm=False,
            **options,
        )
        index = {output.request_id: i for i, output in enumerate(outputs)}
        groups = [
            # The engine appends a suffix of its own to the ids it was given.
            tuple(index[member.rsplit("-", 1)[0]] for member in group)
            for plan in self.plans
            if plan is not None
            for group in plan.groups
        ]
        return torch.tensor([output.outputs.probs for output in outputs]), groups

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def make_engine() -> Iterator[Callable[..., RecordingEngine]]:
    """Engines that are shut down with the module."""
    engines: list[RecordingEngine] = []

    def make(model: Path, **options: Any) -> RecordingEngine:
        engines.append(RecordingEngine(model, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
