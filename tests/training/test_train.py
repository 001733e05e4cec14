"""``revmux train`` and ``revmux eval``, as a user runs them, on a tiny backbone."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import random_prompts
from safetensors.torch import load_file
from typer.testing import CliRunner

from revmux_vllm import checkpoint
from revmux_vllm.backbones import LlamaBackbone
from revmux_vllm.cli import app
from revmux_vllm.reference import classify
from revmux_vllm.training.evaluate import groupings, predict
from revmux_vllm.training.features import Features
from revmux_vllm.training.losses import random_groups

runner = CliRunner()


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Texts whose label is whether the word w7 stands in them."""
    rng = random.Random(seed)
    lines = ["label\ttext"]
    for i in range(count):
        words = [f"w{rng.randrange(10, 300)}" for _ in range(rng.randint(2, 12))]
        if i % 2:
            words[rng.randrange(len(words))] = "w7"
        lines.append(f"{i % 2}\t{' '.join(words)}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    backbone = tiny_checkpoint.parent / "backbone"
    before = (backbone / "model.safetensors").read_bytes()
    arguments = f"""train --backbone {backbone} --train {write_rows(root / "train.tsv", 256, 0)}
        --eval {write_rows(root / "dev.tsv", 64, 1)} --output {root / "out"} --widths 2,4
        --prefill-layers 1 --epochs 2 --batch-size 32 --adapter-hidden-size 24 --bundle-backbone
        --store-dtype bfloat16"""
    result = runner.invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    assert "width 4" in result.output
    assert (backbone / "model.safetensors").read_bytes() == before
    return root / "out"


def test_the_folder_is_a_checkpoint(trained: Path) -> None:
    assert checkpoint.validate(trained).widths == (2, 4)
    tensors = load_file(trained / checkpoint.ADAPTER_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {key.removeprefix("revmux.4.") for key in tensors if key.startswith("revmux.4.")} == {
        "norm.weight",
        "skip_norm.weight",
        "down",
        "scale",
        *(f"coupling.functions.{i}.{j}.{p}" for i in range(4) for j in (0, 2) for p in WB),
        *(f"up.{i}.{p}" for i in (0, 2, 4) for p in WB),
    }
    assert "early exit after layer 1" in (trained / "README.md").read_text()


WB = ("weight", "bias")


def test_every_adapter_parameter_has_moved(trained: Path, tiny_checkpoint: Path) -> None:
    """A part that gets no gradient would stay at its initial value."""
    state = checkpoint.load_adapters(trained, torch.float32).state_dict()
    for key, tensor in state.items():
        if key.endswith(("norm.weight", "scale")):
            assert not torch.equal(tensor, torch.ones_like(tensor)), key
        if key.endswith("bias"):
            assert tensor.abs().max() > 0, key


def test_eval_prints_one_json_object(trained: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "dev.tsv", 64, 1)
    result = runner.invoke(app, ["eval", str(trained), "--eval", str(rows), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"backbone", "widths"}
    assert report["widths"]["4"]["prefill_layers"] == 1
    accuracy = report["widths"]["2"]["accuracy"]
    assert accuracy["min"] <= accuracy["mean"] <= accuracy["max"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--widths 2,5", "5 does not divide"),
        ("--widths two", "expected integers such as 2,4,8"),
        ("--prefill-layers 4", "fewer than the backbone's 4 layers"),
        ("--batch-size 30 --widths 4", "a multiple of the widest width"),
        ("--backbone nowhere", "expected a folder with a config.json"),
        ("--train nowhere.tsv", "no such file"),
        ("--store-dtype int8", "expected float32, bfloat16 or float16"),
    ],
)
def test_mistakes_end_with_a_clear_error(
    tiny_checkpoint: Path, tmp_path: Path, change: str, message: str
) -> None:
    rows = write_rows(tmp_path / "rows.tsv", 64, 0)
    arguments = f"""train --backbone {tiny_checkpoint.parent / "backbone"} --train {rows}
        --output {tmp_path / "out"} {change}"""
    result = runner.invoke(app, arguments.split())
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_batched_prediction_equals_the_reference(tiny_checkpoint: Path) -> None:
    """Evaluation pads many composites together; the reference runs them one by one."""
    backbone = LlamaBackbone.from_folder(tiny_checkpoint, 1)
    ladder = checkpoint.load_adapters(tiny_checkpoint)
    prompts = random_prompts(3, 40, longest=60)
    hidden = [backbone.lower(torch.tensor([prompt]))[0] for prompt in prompts]
    vectors = torch.stack([backbone.upper(h[None])[0, -1] for h in hidden])
    starts = torch.tensor([0, *(len(h) for h in hidden)]).cumsum(0)
    features = Features(
        torch.cat(hidden), starts, vectors, backbone.head(vectors), torch.zeros(40).long()
    )
    groups = next(groupings([len(p) for p in prompts], 8, (2, 4, 8), window=40))
    torch.testing.assert_close(
        predict(backbone, ladder, features, groups),
        classify(backbone, ladder, prompts, groups),
        atol=1e-4,
        rtol=1e-4,
    )


def test_random_groups_cover_the_batch_with_carriers_first() -> None:
    lengths = torch.randint(1, 50, (32,))
    groups = random_groups(lengths, 4)
    assert sorted(groups.flatten().tolist()) == list(range(32))
    assert (lengths[groups][:, 0] == lengths[groups].amax(1)).all()
