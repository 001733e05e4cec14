"""A served model whose answers are known without knowing the plan.

Its upper layers pass their input on (zero output projections), its adapters have no biases and read
the stream alone, so the demultiplexed vector is the member's own up to a positive factor: company
cannot change its label, but a mix-up of streams, rows or owners does. Of 256 labels hardly two
requests share one. Probabilities do change with that factor, so they tell a packed answer from the
backbone's own.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from word_tokenizers import VOCAB_SIZE, word_tokenizer

from revmux_vllm import checkpoint
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.reference import classify
from revmux_vllm.rungs import parse_rungs

NUM_LABELS = 256
WIDTHS = (1, 2, 4)
NUM_PREFIXES, PREFIX_WORDS = 3, 100


def make_transparent_checkpoint(root: Path, hidden_size: int = 64, num_layers: int = 3) -> Path:
    """See the module's docstring."""
    torch.manual_seed(1)
    llama = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=2.4 / hidden_size**0.5,
        pad_token_id=0,
        num_labels=NUM_LABELS,
    )
    model = LlamaForSequenceClassification(llama)
    config = RevMuxConfig(parse_rungs(["mux:2", "mux:4"]), prefill_layers=1)
    ladder = AdapterLadder(config, hidden_size)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for rung, adapter in ladder.items():
            mux: Any = adapter.path.mux  # type: ignore[union-attr]
            up: Any = adapter.read.up
            up[0].weight[:, hidden_size // rung.mux :] = 0
            mux.down.copy_(mux.down[:1].expand_as(mux.down))
        for name, parameter in ladder.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "coupling" in name:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(root / "backbone")
    word_tokenizer().save_pretrained(root / "backbone")
    folder = root / "transparent"
    checkpoint.save(folder, ladder, root / "backbone", "# test\n", bundle_backbone=True)
    return folder


class Known:
    """Texts and the label that each must get, by the rung it may have run at.

    Attributes:
        texts: ``count`` of them, 1 to 40 words each, behind a prefix of ``PREFIX_WORDS`` for a
            share of them.
        labels: of each text, those that it gets at any of ``WIDTHS``.
        probabilities: by width (B, C), each text packed with the next shorter ones.
    """

    def __init__(self, folder: Path, count: int, prefixed: float = 0.0) -> None:
        rng = random.Random(0)
        self.prompts = [
            [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 40))] for _ in range(count)
        ]
        for i in range(round(prefixed * count)):
            self.prompts[i][:0] = [i % NUM_PREFIXES + 1] * PREFIX_WORDS
        self.texts = [" ".join(f"w{token}" for token in prompt) for prompt in self.prompts]
        backbone = load_backbone(folder, 1)
        ladder = checkpoint.load_adapters(folder)
        by_length = sorted(range(count), key=lambda i: -len(self.prompts[i]))
        self.labels: list[set[str]] = [set() for _ in range(count)]
        self.probabilities: dict[int, torch.Tensor] = {}
        for width in WIDTHS:
            groups = [tuple(by_length[i : i + width]) for i in range(0, count, width)]
            answers = classify(backbone, ladder, self.prompts, groups).softmax(-1)
            self.probabilities[width] = answers
            for allowed, answer in zip(self.labels, answers.argmax(-1).tolist(), strict=True):
                allowed.add(f"LABEL_{answer}")
