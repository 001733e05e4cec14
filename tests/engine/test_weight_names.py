"""Whatever files transformers reads a backbone from, the engine finds the same weights in them."""

from pathlib import Path

import pytest
from conftest import save_backbone
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from revmux_vllm.engine.models.names import BackboneNames

ODD = ("bert.embeddings.position_ids", "cls.predictions.bias", "model.rotary_emb.inv_freq")


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "llama", "qwen2"]
)
def test_names_are_found_as_transformers_finds_them(family: str, tmp_path: Path) -> None:
    save_backbone(family, tmp_path)
    names = BackboneNames(AutoConfig.from_pretrained(tmp_path), None)
    state = load_file(tmp_path / "model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    read = set(model.state_dict())
    for name in state:
        assert names.find(name) == (name if name in read else None)
    assert not any(map(names.find, ODD))


def test_files_of_a_trunk_alone_and_of_old_programs(tmp_path: Path) -> None:
    save_backbone("bert", tmp_path)
    names = BackboneNames(AutoConfig.from_pretrained(tmp_path), None)
    state = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name in state:
        other = name.removeprefix("bert.")
        for new, before in old.items():
            other = other.replace(new, before)
        renamed[other] = name
        assert names.find(other) == name
    save_file({n: state[own] for n, own in renamed.items()}, tmp_path / "model.safetensors")
    _, loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not loaded["missing_keys"], "transformers no longer reads such files"


def test_what_a_quantized_layer_brings_is_kept(tmp_path: Path) -> None:
    save_backbone("llama", tmp_path)
    names = BackboneNames(AutoConfig.from_pretrained(tmp_path), None)
    scale = "model.layers.0.self_attn.q_proj.weight_scale"
    assert names.find(scale) == scale
