"""Folders round-trip bit for bit, and a broken one is refused before anything loads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_checkpoint, save_backbone
from safetensors.torch import load_file, save_file

from revmux_vllm import bundled, checkpoint
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / checkpoint.ADAPTER_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_round_trips_bit_for_bit(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    first = checkpoint.load_adapters(folder, dtype)
    checkpoint.save(tmp_path / "again", first, folder, "# card\n", bundle_backbone=True)
    second = checkpoint.load_adapters(tmp_path / "again")
    assert first.config == second.config
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, tensor in first.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, second.state_dict()[key]), key


def test_the_adapter_file_holds_adapter_keys_alone(folder: Path) -> None:
    keys = load_file(folder / checkpoint.ADAPTER_FILE).keys()
    assert {key.split(".")[0] for key in keys} == {"revmux"}
    assert {key.split(".")[1] for key in keys} == {"paths", "readers"}
    assert {key.split(".")[2] for key in keys} == {"mux:2", "mux:4", "mux:8"}


def test_the_backbone_can_be_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, bundle_backbone=False)
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()
    assert checkpoint.backbone_folder(folder) == str(tmp_path / "backbone")
    checkpoint.validate(folder)


def test_another_backbone_than_the_named_one_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, bundle_backbone=False)
    shutil.rmtree(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"revmux\.backbone: .*backbone is not there any more"):
        checkpoint.validate(folder)
    make_tiny_checkpoint(tmp_path / "other", family="mistral", num_layers=5)
    (tmp_path / "other" / "backbone").rename(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"model_type: 'mistral' .* num_hidden_layers: 5 in the"):
        checkpoint.validate(folder)


def test_another_training_of_the_named_backbone_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, bundle_backbone=False)
    backbone = tmp_path / "backbone"
    trained = load_file(backbone / "model.safetensors")
    # Written anew by another program, it is the same.
    save_file(dict(reversed(trained.items())), backbone / "model.safetensors", {"by": "another"})
    checkpoint.validate(folder)
    head = trained["score.weight"] + 0.01
    save_file(trained | {"score.weight": head}, backbone / "model.safetensors")
    with pytest.raises(ValueError, match=r"not the backbone .* weights were .* are .*; name that"):
        checkpoint.validate(folder)
    save_file(trained, backbone / "model.safetensors")
    change_config(backbone, lambda c: c["id2label"].update({"0": "c"}))
    with pytest.raises(ValueError, match=r"labels were LABEL_0, .* are c, LABEL_1, .*; name that"):
        checkpoint.validate(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("revmux.paths.mux:2.mux.scale"),
            "revmux.paths.mux:2.mux.scale: missing",
        ),
        (
            lambda t: t.update({"revmux.2.extra": torch.zeros(1)}),
            "revmux.2.extra: unknown key",
        ),
        (
            lambda t: t.update({"revmux.paths.mux:4.mux.scale": torch.zeros(63)}),
            r"revmux.paths.mux:4.mux.scale: expected shape \[64\], found \[63\]",
        ),
        (
            lambda t: t.update(
                {"revmux.paths.mux:4.mux.scale": torch.zeros(64, dtype=torch.int32)}
            ),
            r"revmux.paths.mux:4.mux.scale: expected one of .*'F32'.*, found I32",
        ),
        (
            lambda t: t.update(
                {"revmux.paths.mux:4.mux.scale": torch.zeros(64, dtype=torch.float16)}
            ),
            "expected one dtype for all weights, found",
        ),
    ],
)
def test_broken_weights_are_refused(folder: Path, change: Any, message: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.validate(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("revmux"), "revmux: missing"),
        (
            lambda c: c["revmux"].update(rungs=["mux:2", "mux:5"]),
            "5 does not divide .* hidden_size 64",
        ),
        (
            lambda c: c.update(model_type="mistral"),
            r"expected \['RevMuxMistral.*'mistral', found \['RevMuxLlama",
        ),
        (lambda c: c["revmux"].update(prefill_layers=4), "fewer than the backbone's 4 layers"),
        (lambda c: c["revmux"].update(surprise=1), "revmux.surprise: unknown key"),
    ],
)
def test_broken_configs_are_refused(folder: Path, change: Any, message: str) -> None:
    change_config(folder, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.validate(folder)


def test_missing_and_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        checkpoint.validate(tmp_path)
    (folder / checkpoint.ADAPTER_FILE).write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoint.validate(folder)
    (folder / checkpoint.ADAPTER_FILE).unlink()
    with pytest.raises(ValueError, match=r"adapter\.safetensors is missing"):
        checkpoint.validate(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        checkpoint.validate(folder)


def test_writing_again_leaves_nothing_of_before(folder: Path, tmp_path: Path) -> None:
    """A backbone that is no longer bundled must go, or vLLM would read it beside the named one."""
    ladder, backbone = checkpoint.load_adapters(folder), tmp_path / "backbone"
    shutil.copytree(folder, backbone)
    for bundle in (True, False):
        checkpoint.save(tmp_path / "out", ladder, backbone, "# card", bundle_backbone=bundle)
        assert (tmp_path / "out" / "model.safetensors").exists() is bundle
    assert (tmp_path / "out" / checkpoint.ADAPTER_FILE).stat().st_mode & 0o044 == 0o044
    with pytest.raises(ValueError, match="that is the backbone's folder"):
        checkpoint.save(backbone, ladder, backbone, "# card")


def test_the_bundled_checkpoint_is_whole_and_small() -> None:
    folder = bundled.resolve("revmux-llama")
    config = checkpoint.validate(folder)
    assert [rung.mux for rung in config.rungs if rung.mux > 1] == [2, 4, 8]
    rungs = {"exit", "mux:2", "mux:4", "mux:8", "merge:2", "merge:4"}
    assert checkpoint.read_report(folder)["rungs"].keys() == rungs
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    with pytest.raises(ValueError, match="no such folder; bundled are revmux-llama"):
        bundled.resolve("nothing-here")


@pytest.mark.parametrize(("family", "theirs"), [("llama", "Llama"), ("gemma3_text", "Gemma3")])
def test_vllm_alone_gets_the_backbone_under_a_name_that_it_knows(
    family: str, theirs: str, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path, family=family, bundle_backbone=False)
    (tmp_path / "links").mkdir()
    plain = Path(checkpoint.plain_backbone(folder, tmp_path / "links"))
    architectures = json.loads((plain / "config.json").read_text())["architectures"]
    assert architectures == [f"{theirs}ForSequenceClassification"]
    weights = (plain / "model.safetensors").resolve()
    assert weights == tmp_path / "backbone" / "model.safetensors"


def test_a_mistral_with_kinds_of_layers_is_a_ministral(tmp_path: Path) -> None:
    """For transformers, and so for a checkpoint over it."""
    save_backbone("ministral", tmp_path / "backbone")
    change_config(tmp_path / "backbone", lambda values: values.update(model_type="mistral"))
    ladder = AdapterLadder(RevMuxConfig((Rung(1, 2),), prefill_layers=1), 64)
    checkpoint.save(tmp_path / "out", ladder, tmp_path / "backbone", "# card\n")
    assert checkpoint.validate(tmp_path / "out").backbone == str(tmp_path / "backbone")
    assert checkpoint.read_config(tmp_path / "out")[1]["model_type"] == "ministral"
