"""A tiny random checkpoint, trainings of a moment, and engines whose plans can be seen."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from typer.testing import CliRunner
from word_tokenizers import VOCAB_SIZE, word_tokenizer

from revmux_vllm import checkpoint
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.cli import app
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.engine.plain import PlainEngine
from revmux_vllm.planning.costs import Backlog
from revmux_vllm.rungs import Rung, parse_rungs

pytest_plugins = ["workers"]

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

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
        prompts.append([rng.randrange(1, VOCAB_SIZE) for _ in range(length)])  # 0 is padding
    return prompts


WINDOWS: dict[str, Any] = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}
"""Of up to five layers."""
RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"],
    "layer_norm_eps": 1e-7,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-v1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True} | WINDOWS),
    "qwen3-windows": ("qwen3", {"use_sliding_window": True} | WINDOWS),
    "ministral": ("ministral", WINDOWS),
    "mistral": ("mistral", {"sliding_window": 24}),
    "gemma3_text": ("gemma3_text", WINDOWS),
    "modernbert-mean": ("modernbert", {}),
    # As v3 is published, but for fewer buckets, so that long texts reach the last of them.
    "deberta-v2": (
        "deberta-v2",
        RELATIVE | {"position_buckets": 16, "share_att_key": True, "position_biased_input": False},
    ),
    # What v2 may have and v3 has not.
    "deberta-v2-rich": (
        "deberta-v2",
        RELATIVE | {"type_vocab_size": 2, "embedding_size": 48, "conv_kernel_size": 3},
    ),
    "deberta-v2-absolute": ("deberta-v2", {}),
}
"""Backbones with other options than their family's own: the family and those."""


def tiny_config(family: str, hidden_size: int, num_layers: int, num_labels: int) -> Any:
    """Of a random backbone of some family, or variant of one."""
    name, more = VARIANTS.get(family, (family, {}))
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": max(1, hidden_size // 64),
        "head_dim": 32,
        "max_position_embeddings": 520,
        # Large, so that tokens matter; not larger with the size, which would amplify rounding.
        "initializer_range": 1.6 / hidden_size**0.5,
    }
    if name in ("bert", "roberta", "xlm-roberta", "electra", "gpt2", "modernbert", "deberta-v2"):
        del sizes["num_key_value_heads"], sizes["head_dim"]
    if name == "modernbert":  # layers 1 and 2 have a window: 16 rows to either side
        sizes |= {"max_position_embeddings": 2560, "local_attention": 32}
        sizes["classifier_pooling"] = "mean" if family == "modernbert-mean" else "cls"
    if name == "electra":
        sizes["embedding_size"] = hidden_size // 2
    if name == "distilbert":
        sizes = {
            "vocab_size": VOCAB_SIZE,
            "dim": hidden_size,
            "hidden_dim": 2 * hidden_size,
            "n_layers": num_layers,
            "n_heads": hidden_size // 32,
            "max_position_embeddings": 520,
            "initializer_range": sizes["initializer_range"],
        }
    if name == "t5":
        sizes = {
            "vocab_size": VOCAB_SIZE,
            "d_model": hidden_size,
            "d_kv": 32,
            "d_ff": 2 * hidden_size,
            "num_layers": num_layers,
            "num_heads": hidden_size // 32,
            "decoder_start_token_id": 0,
        }
    if "layer_types" in more:
        sizes["layer_types"] = more["layer_types"][:num_layers]
    return AutoConfig.for_model(name, **more | sizes, pad_token_id=0, num_labels=num_labels)


def save_backbone(
    family: str,
    folder: Path,
    language_model: bool = False,
    *,
    hidden_size: int = 64,
    num_layers: int = 4,
    num_labels: int = 3,
) -> None:
    """A random backbone of some family in float32, and the word tokenizer beside it."""
    torch.manual_seed(0)
    config = tiny_config(family, hidden_size, num_layers, num_labels)
    kind: Any = AutoModelForSequenceClassification
    if config.model_type == "t5":
        kind = AutoModelForSeq2SeqLM
    elif language_model:
        kind = AutoModelForCausalLM
    model = kind.from_config(config)
    if family.startswith("gemma"):  # whose norms begin at zero, one and all
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    write_as_others_do(family, folder, hidden_size)
    word_tokenizer().save_pretrained(folder)


def write_as_others_do(family: str, folder: Path, hidden_size: int) -> None:
    """Weights that ``save_pretrained`` does not write, and files of the hub have."""
    if family == "t5-v1.1":  # transformers ties it until it finds another head in the file
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = torch.randn_like(state["shared.weight"])
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    if family in ("roberta", "xlm-roberta"):  # the most downloaded hold it, no classifier reads it
        state = load_file(folder / "model.safetensors")
        state["roberta.pooler.dense.weight"] = torch.randn(hidden_size, hidden_size)
        state["roberta.pooler.dense.bias"] = torch.randn(hidden_size)
        state["roberta.embeddings.position_ids"] = torch.arange(520)[None]
        save_file(state, folder / "model.safetensors", {"format": "pt"})


def make_tiny_checkpoint(
    root: Path,
    *,
    bundle_backbone: bool = True,
    hidden_size: int = 64,
    num_layers: int = 4,
    rungs: str = "mux:2,mux:4,mux:8",
    family: str = "llama",
    language_model: bool = False,
    num_labels: int = 3,
    **revmux: Any,
) -> Path:
    """A random 4-layer backbone with random adapters for some rungs, all in float32."""
    backbone = root / "backbone"
    save_backbone(
        family,
        backbone,
        language_model,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_labels=num_labels,
    )
    options: dict[str, Any] = {"prefill_layers": 1, "adapter_hidden_size": 48}
    ladder = AdapterLadder(
        RevMuxConfig(parse_rungs(rungs.split(",")), **options | revmux), hidden_size
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


def write_rows(path: Path, count: int, seed: int, labels: bool = True) -> Path:
    """Texts whose label is whether the word w7 stands in them."""
    rng = random.Random(seed)
    lines = ["label\ttext" if labels else "text"]
    for i in range(count):
        words = [f"w{rng.randrange(10, 300)}" for _ in range(rng.randint(2, 12))]
        if i % 2:
            words[rng.randrange(len(words))] = "w7"
        lines.append((f"{i % 2}\t" if labels else "") + " ".join(words))
    path.write_text("\n".join(lines) + "\n")
    return path


def revmux(arguments: str) -> Result:
    """The command as a user types it."""
    return CliRunner().invoke(app, arguments.split())


Train = Callable[..., Result]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """``revmux train`` on a random backbone of some family, for a moment; later options win."""

    def run(more: str = "", family: str = "llama", language_model: bool = False) -> Result:
        backbone = tmp_path / "backbone"
        if not backbone.exists():
            save_backbone(family, backbone, language_model, num_labels=2)
        if not (tmp_path / "train.tsv").exists():
            write_rows(tmp_path / "train.tsv", 160, 0)
        return revmux(
            f"train --backbone {backbone} --train {tmp_path / 'train.tsv'} "
            f"--output {tmp_path / 'out'} --prefill-layers 1 --epochs 1 --augment 0 "
            "--rungs mux:2,mux:4,merge:2,merge:2+mux:2,exit "
            f"--batch-size 16 --adapter-hidden-size 24 {more}"
        )

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three rungs, measured, in bfloat16."""
    root = tmp_path_factory.mktemp("train")
    save_backbone("llama", root / "backbone", num_labels=2)
    result: Any = revmux(
        f"train --backbone {root / 'backbone'} --train {write_rows(root / 'train.tsv', 256, 0)} "
        f"--eval {write_rows(root / 'dev.tsv', 64, 1)} --output {root / 'out'} "
        "--rungs mux:2,mux:4,merge:2,exit "
        "--prefill-layers 1 --epochs 2 --batch-size 32 --adapter-hidden-size 24 --bundle-backbone "
        "--store-dtype bfloat16"
    )
    assert result.exit_code == 0, result.output
    assert "mux:4" in result.output
    assert "vllm serve" in result.output
    return root / "out"


class ByCrowd:
    """Policy of tests: rungs of which a row stands for as many as there are requests, or for fewer;
    ``exit`` needs one more.

    So batches of several sizes run at every one of ``rungs`` and at the backbone alone.
    """

    window = 1024
    alone_because = "light_load"
    defers = False

    in_use = Rung()

    def __init__(self, rungs: tuple[Rung, ...]) -> None:
        self.levels = [self.in_use]
        self._rungs = rungs

    def rungs(self, backlog: Backlog) -> tuple[Rung, ...]:
        rows = {r: max(2, r.shortening * r.mux) for r in self._rungs if not r.exit}
        most = max(rows.values(), default=0)
        return tuple(r for r in self._rungs if rows.get(r, most + 1) <= backlog.num_requests)


SMALL: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}
"""Options of every engine of the tests; later ones win."""


class RecordingEngine(InProcessEngine):
    """Keeps the plan of every step it ran; by crowd, whatever the load."""

    def __init__(self, model: Path, **options: Any) -> None:
        super().__init__(model, quiet=False, **SMALL | options)
        self.plans: list[Any] = []
        self.cached_tokens = 0
        own = self.planner.config.rungs
        self.planner.policy = ByCrowd(tuple(rung for rung in own if not rung.exit))
        scheduler = self.scheduler
        schedule = scheduler.schedule

        def recording(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.plans.append(getattr(output, "mux_plan", None))
            return output

        scheduler.schedule = recording

    def answers(
        self, prompts: list[list[int]], salts: list[str] | None = None
    ) -> tuple[torch.Tensor, list[tuple[int, ...]], list[Rung]]:
        """Probabilities (B, C), the groups that they were computed in, and these groups' rungs."""
        self.plans.clear()
        outputs = self.classify(prompts, salts=salts)
        self.cached_tokens = sum(output.num_cached_tokens for output in outputs)
        index = {output.request_id: i for i, output in enumerate(outputs)}
        plans = [plan for plan in self.plans if plan is not None]
        groups = [
            # The engine appends a suffix of its own to the ids it was given.
            tuple(index[member.rsplit("-", 1)[0]] for member in group)
            for plan in plans
            for group in plan.groups
        ]
        rungs = [rung for plan in plans for rung in plan.rungs]
        return torch.tensor([output.outputs.probs for output in outputs]), groups, rungs


@pytest.fixture
def make_engine() -> Iterator[Callable[..., RecordingEngine]]:
    """Engines that are shut down with the test: each holds most of a GiB."""
    engines: list[RecordingEngine] = []

    def make(model: Path, **options: Any) -> RecordingEngine:
        engines.append(RecordingEngine(model, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def plain_vllm() -> Iterator[Callable[..., PlainEngine]]:
    """Plain vLLM over a backbone, in a process of its own that ends with the test."""
    with ExitStack() as stack:

        def start(backbone: Path, **options: Any) -> PlainEngine:
            engine = PlainEngine(backbone, **SMALL | options, enable_prefix_caching=False)
            stack.callback(engine.close)
            return engine

        yield start
