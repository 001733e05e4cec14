"""A checkpoint of the hub, over a backbone of the hub: online, from the cache, and offline."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_checkpoint, random_prompts
from local_hub import LocalHub
from safetensors.torch import load_file, save_file

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.inspection import describe
from revmux_vllm.reference import classify
from revmux_vllm.rungs import Rung

BACKBONE, CHECKPOINT = "someone/backbone", "someone/checkpoint"
OLD, NEW, ONLY = "a" * 40, "b" * 40, "c" * 40
CLASSIFY = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, TokensPrompt
llm = LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=300)
outputs = llm.classify([TokensPrompt(prompt_token_ids=ids) for ids in json.loads(sys.argv[2])])
config = llm.llm_engine.model_config
answers = [list(output.outputs.probs) for output in outputs]
print("RESULT", json.dumps({"answers": answers, "name": config.served_model_name}))
"""


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that names a folder."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("made"), bundle_backbone=False)


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """The same over a commit of a backbone that has been trained anew since."""
    made = tmp_path_factory.mktemp("hub")
    old = Path(checkpoint.backbone_folder(folder))
    new = Path(shutil.copytree(old, made / "new"))
    state = load_file(new / "model.safetensors")
    state["score.weight"] = -state["score.weight"]
    save_file(state, new / "model.safetensors", {"format": "pt"})
    named = Path(shutil.copytree(folder, made / "checkpoint"))
    values = json.loads((named / "config.json").read_text())
    values["revmux"] |= {"backbone": BACKBONE, "backbone_revision": OLD, "fingerprint": None}
    (named / "config.json").write_text(json.dumps(values))
    models = {BACKBONE: [(OLD, old), (NEW, new)], CHECKPOINT: [(ONLY, named)]}
    with LocalHub(models) as running:
        yield running


@pytest.fixture(scope="module")
def environment(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}


def expected(folder: Path, prompts: list[list[int]]) -> torch.Tensor:
    """What the backbone of the pinned commit answers."""
    ladder = checkpoint.load_adapters(folder)
    backbone = load_backbone(checkpoint.backbone_folder(folder), 1)
    groups = [(i,) for i in range(len(prompts))]
    return classify(backbone, ladder, prompts, groups, [Rung()] * len(prompts)).softmax(-1)


def test_vllm_serves_it_by_its_name_online_and_from_the_cache(
    folder: Path, hub: LocalHub, environment: dict[str, str]
) -> None:
    prompts = random_prompts(3, 6)
    own = expected(folder, prompts)
    for offline in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        said = run(environment | offline, "-c", CLASSIFY, CHECKPOINT, json.dumps(prompts))
        result: dict[str, Any] = json.loads(said.split("RESULT ")[-1].splitlines()[0])
        torch.testing.assert_close(torch.tensor(result["answers"]), own, atol=1e-4, rtol=0)
        assert result["name"] == CHECKPOINT
    assert any(path.startswith(f"/{BACKBONE}/resolve/{OLD}/") for path in hub.requests)
    assert not any(path.startswith(f"/{BACKBONE}/resolve/{NEW}/") for path in hub.requests)


def test_the_commands_take_its_name(folder: Path, environment: dict[str, str]) -> None:
    facts = json.loads(run(environment, "-m", "revmux_vllm.cli", "inspect", CHECKPOINT, "--json"))
    assert facts["backbone"] == f"{BACKBONE} at {OLD}"
    assert facts["rungs"].keys() == {"mux:2", "mux:4", "mux:8"}
    assert facts["backbone_fingerprint"] is None
    assert len(describe(folder)["backbone_fingerprint"]) == 64


def test_what_cannot_be_had_is_named_with_the_cure(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "revmux_vllm.cli", "inspect", "someone/nothing"]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "someone/nothing: cannot be had from the hub" in done.stderr
    assert "is the name right" in done.stderr
