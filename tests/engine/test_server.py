"""The real server: every answer goes to the request that asked, whatever else happens.

The checkpoint is built so that answers are known without knowing the plan. Its upper layers pass
their input on (zero output projections), its adapters have no biases and read the stream alone, so
the demultiplexed vector is the member's own up to a positive factor: company cannot change its
label, but a mix-up of streams, rows or owners does. Of 256 labels hardly two requests share one.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import torch
from bursts import parse_rung_counts
from transformers import LlamaConfig, LlamaForSequenceClassification
from word_tokenizers import VOCAB_SIZE, word_tokenizer

from revmux_vllm import checkpoint
from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.backbones import load_backbone
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.local_server import LocalServer
from revmux_vllm.reference import classify
from revmux_vllm.rungs import parse_rungs

NUM_LABELS = 256
HIDDEN_SIZE = 64


def make_transparent_checkpoint(root: Path) -> Path:
    """See the module's docstring."""
    torch.manual_seed(1)
    llama = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=NUM_LABELS,
    )
    model = LlamaForSequenceClassification(llama)
    config = RevMuxConfig(parse_rungs(["mux:2", "mux:4"]), prefill_layers=1)
    ladder = AdapterLadder(config, HIDDEN_SIZE)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for rung, adapter in ladder.items():
            for name, parameter in adapter.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "coupling" in name:
                    parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
            mux: Any = adapter.mux
            mux.up[0].weight[:, HIDDEN_SIZE // rung.mux :] = 0
            mux.down.copy_(mux.down[:1].expand_as(mux.down))
    model.save_pretrained(root / "backbone")
    word_tokenizer().save_pretrained(root / "backbone")
    folder = root / "transparent"
    checkpoint.save(folder, ladder, root / "backbone", "# test\n", bundle_backbone=True)
    return folder


class Known:
    """Texts and the label that each must get, by the rung it may have run at."""

    def __init__(self, folder: Path, count: int) -> None:
        rng = random.Random(0)
        self.prompts = [
            [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 40))] for _ in range(count)
        ]
        self.texts = [" ".join(f"w{token}" for token in prompt) for prompt in self.prompts]
        backbone = load_backbone(folder, 1)
        ladder = checkpoint.load_adapters(folder)
        by_length = sorted(range(count), key=lambda i: -len(self.prompts[i]))
        self.labels: list[set[str]] = [set() for _ in range(count)]
        for width in (1, 2, 4):
            groups = [tuple(by_length[i : i + width]) for i in range(0, count, width)]
            answers = classify(backbone, ladder, self.prompts, groups).argmax(-1).tolist()
            for allowed, answer in zip(self.labels, answers, strict=True):
                allowed.add(f"LABEL_{answer}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transparent_checkpoint(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    extra = ("--served-model-name", "known", "--enforce-eager", "--dtype", "float32")
    with LocalServer(str(folder), extra_args=extra) as running:
        running.wait_ready(300)
        yield running


def body(text: Any) -> dict[str, Any]:
    return {"model": "known", "input": text}


async def ask(session: aiohttp.ClientSession, text: str) -> str:
    async with session.post("/classify", json=body(text)) as response:
        assert response.status == 200, await response.text()
        return (await response.json())["data"][0]["label"]


async def ask_all(server: LocalServer, texts: list[str], *beside: Any) -> list[str]:
    """All texts at once, a connection each, with other coroutines running beside them."""
    async with aiohttp.ClientSession(
        server.base_url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=300),
    ) as session:
        answers, *_ = await asyncio.gather(
            asyncio.gather(*(ask(session, text) for text in texts)),
            *(run(session) for run in beside),
        )
    return answers


def wrong(known: Known, answers: list[str], indices: list[int]) -> list[int]:
    return [i for i, a in zip(indices, answers, strict=True) if a not in known.labels[i]]


def requests_by_rung(server: LocalServer) -> Counter[str]:
    return parse_rung_counts(httpx.get(f"{server.base_url}/metrics").text)


def test_each_of_2000_concurrent_requests_gets_its_own_answer(
    server: LocalServer, folder: Path
) -> None:
    known = Known(folder, 2000)
    distinct = {frozenset(labels) for labels in known.labels}
    assert len(distinct) > 200, "the labels no longer tell the requests apart"
    before = requests_by_rung(server)
    answers = asyncio.run(ask_all(server, known.texts))
    assert wrong(known, answers, list(range(2000))) == []
    ran = requests_by_rung(server) - before
    assert sum(ran.values()) == 2000
    assert ran["mux:4"] > 100, ran
    assert "vllm:num_requests_running" in httpx.get(f"{server.base_url}/metrics").text


def test_bad_input_is_refused_and_hurts_nobody(server: LocalServer, folder: Path) -> None:
    known = Known(folder, 300)
    seen: dict[str, tuple[int, str]] = {}
    as_json = {"content-type": "application/json"}

    async def misbehave(session: aiohttp.ClientSession) -> None:
        long = " ".join(["w5"] * 600)
        requests = {
            "empty text": {"json": body("")},
            "empty list": {"json": body([])},
            "no input": {"json": {"model": "known"}},
            "a number": {"json": body(5)},
            "too long": {"json": body(long)},
            "one megabyte": {"json": body("w5 " * 350_000)},
            "unknown model": {"json": {"model": "nobody", "input": "w5"}},
            "token out of range": {"json": body([VOCAB_SIZE + 9])},
            "not JSON": {"data": b"{", "headers": as_json},
            "not UTF-8": {
                "data": b'{"model": "known", "input": "\xff\xfe"}',
                "headers": as_json,
            },
        }
        for name, request in requests.items():
            async with session.post("/classify", **request) as response:
                seen[name] = response.status, await response.text()

    answers = asyncio.run(ask_all(server, known.texts, misbehave, misbehave))
    assert wrong(known, answers, list(range(300))) == []
    for name, (status, text) in seen.items():
        assert 400 <= status < 500, (name, status, text)
        assert json.loads(text), name
    assert "512" in seen["too long"][1]
    assert seen["unknown model"][0] == 404
    assert httpx.get(f"{server.base_url}/health").status_code == 200


def test_a_client_that_hangs_up_does_not_hurt_its_partners(
    server: LocalServer, folder: Path
) -> None:
    known = Known(folder, 600)

    async def hang_up(session: aiohttp.ClientSession) -> None:
        for i in range(60):
            task = asyncio.create_task(ask(session, f"w{i + 1} w7"))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    answers = asyncio.run(ask_all(server, known.texts, hang_up))
    assert wrong(known, answers, list(range(600))) == []
    assert httpx.get(f"{server.base_url}/health").status_code == 200


def test_several_texts_in_one_request_keep_their_order(server: LocalServer, folder: Path) -> None:
    known = Known(folder, 40)
    response = httpx.post(f"{server.base_url}/classify", json=body(known.texts), timeout=60)
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(40))
    assert wrong(known, [item["label"] for item in data], list(range(40))) == []
