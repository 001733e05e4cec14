"""``revmux train`` as a user runs it, on tiny backbones."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, save_backbone, write_rows
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from revmux_vllm import checkpoint
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError
from revmux_vllm.families import FAMILIES
from revmux_vllm.rungs import parse_rungs
from revmux_vllm.terminal import as_flag
from revmux_vllm.training import trainer
from revmux_vllm.training.card import front_matter
from revmux_vllm.training.cli import _rungs
from revmux_vllm.training.exits import EXIT_FILE, exit_layers
from revmux_vllm.training.options import AUTO, TrainOptions

WB = ("weight", "bias")
MERGED = ("merger.", "")
UP = {f"up.{i}.{p}" for i in (0, 2, 4) for p in WB}
MIXED = {"norm.weight", "down", "scale", "shift"} | {
    f"coupling.functions.{i}.{j}.{p}" for i in range(4) for j in (0, 2) for p in WB
}
MERGE_KEYS = {"merger.score.weight", "skip_norm.weight"} | {
    f"{part}.{p}" for part in (f"{m}correction.{i}" for m in MERGED for i in (0, 2)) for p in WB
}
MERGE_KEYS |= {f"{part}norm.weight" for part in MERGED}
EXIT_KEYS = {"skip_norm.weight"} | {f"layers.{i}.{p}" for i in (0, 2, 4) for p in WB}
KEYS = {
    "revmux": MIXED | UP,
    "ora": MIXED | UP,
    "vanilla": {"norm.weight", "scale", "shift"}
    | UP
    | {f"maps.{i}.{p}" for i in range(4) for p in WB}
    | {f"mixer.{i}.{p}" for i in (0, 2) for p in WB},
}


def keys_of(rung: str, keys: Iterable[str]) -> set[str]:
    """Of both parts, without their names."""
    prefixes = f"revmux.paths.{rung}.", f"revmux.readers.{rung}."
    return {k.removeprefix(p) for k in keys for p in prefixes if k.startswith(p)}


def keys_of_width_4(folder: Path) -> set[str]:
    keys = load_file(folder / checkpoint.ADAPTER_FILE)
    found = {key.removeprefix("revmux.paths.mux:4.mux.") for key in keys if "mux:4." in key}
    return {key.removeprefix("revmux.readers.mux:4.") for key in found}


def test_the_folder_is_a_checkpoint(trained: Path) -> None:
    rungs = ["exit", "mux:2", "mux:4", "merge:2"]
    assert list(map(str, checkpoint.validate(trained).rungs)) == rungs
    tensors = load_file(trained / checkpoint.ADAPTER_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert keys_of_width_4(trained) == KEYS["revmux"] | {"skip_norm.weight"}
    assert keys_of("merge:2", tensors) == MERGE_KEYS
    card = (trained / "README.md").read_text()
    assert "early exit after 1" in card
    assert keys_of("exit", tensors) == EXIT_KEYS
    assert list(checkpoint.read_report(trained)["rungs"]) == rungs
    assert (trained / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (trained / "training-log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in log)
    assert not (trained / "trainer").exists()
    options = TrainOptions.from_dict(json.loads((trained / "training-options.json").read_text()))
    assert (options.output, options.prefill_layers) == (trained, 1)
    assert (options.recipe.epochs, options.store_dtype) == (2.0, "bfloat16")
    # vLLM reads every safetensors file at the top of a folder.
    assert (trained / EXIT_FILE).is_file()
    assert {p.name for p in trained.glob("*.safetensors")} == {
        "model.safetensors",
        "adapter.safetensors",
    }


def test_the_card_says_to_a_hub_what_it_is(trained: Path) -> None:
    expected = {
        "base_model": "backbone",
        "library_name": "revmux-vllm",
        "pipeline_tag": "text-classification",
        "tags": ["vllm", "revmux", "text-classification"],
    }
    card = ModelCard.load(trained / "README.md")
    assert card.data.to_dict() == expected
    assert card.text.startswith("\n# out\n\nRevMUX adapters (`revmux`) over a frozen backbone")
    assert str(trained.parent) not in card.content


def test_a_card_has_the_backbones_name_and_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# mine\n")
    front = front_matter(str(tmp_path))
    assert (front.base_model, front.license, front.language) == (tmp_path.name, "mit", None)
    (tmp_path / "README.md").write_text("---\n{broken\n---\n")
    assert front_matter(str(tmp_path)).license is None
    assert front_matter("owner/name").base_model == "owner/name"


def test_the_bundled_backbone_is_the_backbone_bit_for_bit(trained: Path) -> None:
    before = load_file(trained.parent / "backbone" / "model.safetensors")
    after = load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_adapters_and_exits_are_trained_and_the_backbone_is_bitwise_unchanged(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimised: list[str] = []
    layers: list[torch.nn.Module] = []
    create = trainer.Trainer.create_optimizer

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create(self, *args, **kwargs)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            optimised.extend(names[id(parameter)] for parameter in group["params"])
        layers.extend(self.model.backbone.layers)
        return optimizer

    monkeypatch.setattr(trainer.Trainer, "create_optimizer", watched)
    assert train("--learning-rate 0.1").exit_code == 0
    adapters = load_file(tmp_path / "out" / checkpoint.ADAPTER_FILE)
    exits = load_file(tmp_path / "out" / EXIT_FILE)
    expected = {key.replace(checkpoint.KEY_PREFIX, "ladder.", 1) for key in adapters}
    assert sorted(optimised) == sorted(expected | {f"exits.{key}" for key in exits})
    stored = load_file(tmp_path / "backbone" / "model.safetensors")
    assert len(layers) == 4
    for i, layer in enumerate(layers):
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, stored[f"model.layers.{i}.{key}"]), key


def test_every_adapter_parameter_has_moved(train: Train, tmp_path: Path) -> None:
    """A part that gets no gradient would stay at its initial value."""
    assert train("--learning-rate 1e-9").exit_code == 0
    start = checkpoint.load_adapters(tmp_path / "out").state_dict()
    assert train("--hold-out 0").exit_code == 0
    end = checkpoint.load_adapters(tmp_path / "out").state_dict()
    for key, tensor in end.items():
        assert (tensor - start[key]).abs().max() > 1e-5, key


@pytest.mark.parametrize("adapter_type", list(KEYS))
def test_the_papers_recipe_with_the_papers_adapters(
    adapter_type: str, train: Train, tmp_path: Path
) -> None:
    result = train(f"--recipe paper --adapter-type {adapter_type} --epochs 1")
    assert result.exit_code == 0, result.output
    assert keys_of_width_4(tmp_path / "out") == KEYS[adapter_type]
    config = checkpoint.validate(tmp_path / "out")
    assert (config.adapter_type, config.skip) == (adapter_type, False)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        *(("bert", ""), ("modernbert-mean", ""), ("mistral", ""), ("gemma3_text", "")),
        *(("distilbert", ""), ("deberta-v2", "")),
        pytest.param("electra", "", marks=pytest.mark.slow),
        *(("qwen3", "w8,w7"), ("t5", "w8,w7")),
    ],
)
def test_every_family_trains(family: str, words: str, train: Train, tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "dev.tsv", 32, 1)
    more = f"--eval {dev}" + (f" --label-words {words}" if words else "")
    result = train(more, family, language_model=bool(words))
    assert result.exit_code == 0, result.output
    config, values = checkpoint.read_config(tmp_path / "out")
    assert values["architectures"] == [FAMILIES[family.removesuffix("-mean")].architecture]
    assert config.label_words == (tuple(words.split(",")) if words else None)


def test_a_cross_encoder_of_one_label_trains(train: Train, tmp_path: Path) -> None:
    save_backbone("bert", tmp_path / "backbone", num_labels=1)
    result = train(f"--eval {write_rows(tmp_path / 'dev.tsv', 32, 1)}")
    assert result.exit_code == 0, result.output
    report = checkpoint.read_report(tmp_path / "out")
    assert report["classes"] == ["no", "yes"]
    assert [sum(row) for row in report["rungs"]["mux:2"]["confusion"]] == pytest.approx([16, 16])


def test_mixed_precision_and_accumulated_batches(train: Train, tmp_path: Path) -> None:
    assert train("--bf16 --gradient-accumulation 3").exit_code == 0
    log = (tmp_path / "out" / "training-log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 144 // (3 * 16)


def test_unlabelled_rows_are_enough_and_are_not_taken_for_labelled_ones(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "train.tsv", 160, 0, labels=False)
    assert train().exit_code == 0
    assert "no column of labels" in caplog.text


@pytest.mark.slow
def test_two_processes_share_a_training(train: Train, tmp_path: Path) -> None:
    """Two ranks, one set of adapters."""
    save_backbone("bert", tmp_path / "backbone", num_labels=2)
    rows = write_rows(tmp_path / "train.tsv", 160, 0)
    # What accelerate launch starts on a machine with two GPUs; on CPUs it would start one process.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "revmux_vllm.cli", "train", "--backbone", str(tmp_path / "backbone")]
    command += ["--train", str(rows), "--output", str(tmp_path / "out"), "--widths", "2,4"]
    command += ["--epochs", "1", "--batch-size", "16", "--augment", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    checkpoint.validate(tmp_path / "out")
    log = (tmp_path / "out" / "training-log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 144 // (2 * 16)  # each rank takes half of the rows


def test_widths_are_short_for_rungs() -> None:
    assert _rungs(AUTO, "4,2") == parse_rungs(["mux:2", "mux:4"])
    assert _rungs(AUTO, None) is None, "a survey proposes them"
    with pytest.raises(UserError) as error:
        _rungs(AUTO, "two")
    message = error.value.words(as_flag, typed=True)
    assert "--widths two: rung 'mux:two': expected exit, mux:N" in message


def test_exits_stand_at_the_cut_at_stops_and_at_most_nine_elsewhere() -> None:
    at = lambda cut, layers, *names: exit_layers(RevMuxConfig(parse_rungs(names), cut), layers)  # noqa: E731
    assert at(1, 4, "mux:2") == [1, 2, 3]
    assert at(3, 12, "mux:2") == [2, 3, 5, 7, 10]
    assert {7, 14} <= set(at(7, 32, "mux:2", "merge:2@14"))
    assert len(at(7, 32, "mux:2")) <= 10
