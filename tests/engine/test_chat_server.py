"""A language model that answers with label words, asked in messages; vLLM applies the template."""

import json
from pathlib import Path

import httpx
import pytest
from conftest import make_tiny_checkpoint
from transformers import AutoTokenizer

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.reference import classify
from revmux_vllm.rungs import Rung

TEMPLATE = (
    "{% for m in messages %}w3 {{ m['content'] }} w4 {% endfor %}"
    "{% if add_generation_prompt %}w5{% endif %}"
)
WORDS = ("w8", "w7", "w311")


def test_messages(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path, language_model=True, rungs="merge:2,exit", label_words=WORDS
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    messages = [
        {"role": "system", "content": "w20 w21 w22"},
        {"role": "user", "content": "w30 w31 w32 w33"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("w3 w20 w21 w22 w4 w3 w30 w31 w32 w33 w4 w5")["input_ids"]
    ladder = checkpoint.load_adapters(folder)
    backbone = load_backbone(folder, 1, WORDS)
    exit_rung = Rung(exit=True)
    expected = classify(backbone, ladder, [prompt], [(0,)], [exit_rung]).softmax(-1)[0]
    untold = classify(backbone, ladder, [prompt[:-1]], [(0,)], [exit_rung]).softmax(-1)[0]
    assert (expected - untold).abs().max() > 1e-2, "the template no longer matters"

    always = '{"revmux": {"rungs": ["exit"], "policy": "fixed:exit"}}'
    options = ("--additional-config", always)
    extra = ("--served-model-name", "words", "--enforce-eager", "--dtype", "float32", *options)
    with LocalServer(str(folder), extra_args=extra) as server:
        server.wait_ready(300)
        body = {"model": "words", "messages": messages, "add_generation_prompt": True}
        response = httpx.post(f"{server.base_url}/classify", json=body, timeout=60)
        (answer,) = response.raise_for_status().json()["data"]
    assert answer["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert answer["label"] == WORDS[int(expected.argmax())]
