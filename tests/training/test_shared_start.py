"""What all rows begin with runs once, and nothing else comes out than where it runs with each."""

from pathlib import Path

import pytest
import torch
from conftest import make_tiny_checkpoint
from transformers import AutoTokenizer

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.training import data, features
from revmux_vllm.training.exits import make_exits
from revmux_vllm.training.ladder_model import LadderModel

RUNGS = "mux:2,mux:4@2,merge:2,merge:3@3,merge:3+mux:2,exit,exit@2"
LAYERS = [1, 2]


def rows(instruction: int) -> data.LabelledText:
    words = " ".join(f"w{20 + i}" for i in range(instruction))
    texts = [f"{words} " + " ".join(f"w{50 + i + j}" for j in range(1 + i % 5)) for i in range(24)]
    return data.LabelledText(texts, [i % 3 for i in range(24)])


@pytest.mark.parametrize(
    ("family", "instruction"), [("llama", 16), ("llama", 23), ("gemma3_text", 40), ("mistral", 40)]
)
def test_parity(
    family: str, instruction: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_checkpoint(tmp_path, rungs=RUNGS, family=family)
    backbone = load_backbone(tmp_path / "backbone", 1)
    ladder = checkpoint.load_adapters(folder)
    exits = make_exits(LAYERS, backbone.hidden_size, 16, 3)
    model = LadderModel(backbone, ladder, exits, paper_loss=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    every = torch.arange(24)
    seen, losses, gradients = [], [], []
    for least in (features.LEAST_SHARED, 1000):
        monkeypatch.setattr(features, "LEAST_SHARED", least)
        own = features.extract(backbone, tokenizer, rows(instruction), 64, LAYERS)
        seen.append(own)
        torch.manual_seed(0)
        model.train()
        model.zero_grad()
        loss = model(
            own.padded(every),
            own.lengths,
            own.labels,
            own.vectors,
            own.logits,
            own.exits.float(),
            own.shared,
        )
        loss["loss"].backward()
        losses.append(loss)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    once, each = seen
    assert once.shared == instruction
    assert each.shared == 0
    assert len(once.hidden) == len(each.hidden) - 23 * once.shared
    for name in ("vectors", "logits", "lengths", "exits"):
        torch.testing.assert_close(getattr(once, name), getattr(each, name), atol=2e-2, rtol=0)
    torch.testing.assert_close(once.vectors, each.vectors, atol=1e-4, rtol=0)
    torch.testing.assert_close(once.padded(every), each.padded(every), atol=1e-4, rtol=0)
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], atol=1e-4, rtol=1e-3, msg=name)
    for own_gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own_gradient, other, atol=1e-3, rtol=1e-2)


def test_rows_that_begin_differently_share_nothing() -> None:
    assert features.shared_tokens([[1, 2, 3], [4, 5, 6]]) == 0
    long = list(range(40))
    assert features.shared_tokens([long, long]) == 39, "all have more"
    assert features.shared_tokens([[*long, 1], [*long, 2], [*long[:20], 9]]) == 20
    assert features.shared_tokens([long]) == 0


def test_copies_keep_the_instruction() -> None:
    texts = [f"Say good or bad of:  a{i} b{i} c{i}\nYour answer:" for i in range(9)]
    copies = data.spliced_copies(data.LabelledText(texts, [0, 1, 0] * 3), 3.0, seed=0)
    assert all(text.startswith("Say good or bad of:  ") for text in copies.texts)
    assert all(text.endswith("\nYour answer:") for text in copies.texts)
    assert len(set(copies.texts)) > 20, "what is between is spliced"
