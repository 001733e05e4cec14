"""``revmux-smollm2``: put together from a wheel, and served by its name from anywhere."""

import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from contracts import samples
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from revmux_vllm import checkpoint
from revmux_vllm.assembly import assembled
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import parse_rung_counts
from revmux_vllm.bundled import bundled_checkpoints
from revmux_vllm.engine.environment import untouched
from revmux_vllm.planning.watching import WINDOW

NAME = "revmux-smollm2"
AGREEMENT = 0.98
LABELS = ["negative", "positive"]
TEXTS = [
    "a warm , funny and beautifully acted film",
    "The battery died before lunch on the second day.",
    "the plot makes no sense , and nobody in it seems to mind",
]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder() -> Path:
    return assembled(bundled_checkpoints()[NAME])


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    options = {"agreement": AGREEMENT, "policy": "fixed:contract", "shadow_rate": 0.1}
    args = ["--enforce-eager", "--dtype", "float32"]
    args += ["--additional-config", json.dumps({"revmux": options})]
    with pytest.MonkeyPatch.context() as patch, untouched():
        patch.chdir(tmp_path_factory.mktemp("anywhere"))
        with LocalServer(NAME, args, env=os.environ) as running:
            running.wait_ready(timeout_s=600)
            yield running


def test_the_repository_has_its_own_weights_alone() -> None:
    files = [path for path in bundled_checkpoints()[NAME].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert not [path for path in files if path.name == "model.safetensors"]


def test_it_is_measured_and_calibrated(folder: Path) -> None:
    config = checkpoint.validate(folder)
    report = checkpoint.read_report(folder)
    assert set(report["rungs"]) == set(map(str, config.rungs))
    assert {rung.mux for rung in config.rungs} == {1, 2, 4}
    assert report["cascade"]
    assert report["early_exit"]
    promised = [contract.agreement for contract in checkpoint.read_contracts(folder)]
    assert sorted(promised) == [0.95, 0.98, 0.99, 0.995]
    assert {row["agreement_promised"] for row in report["contracts"]} == set(promised)


def test_it_answers_as_its_backbone_does(server: LocalServer, folder: Path, tmp_path: Path) -> None:
    backbone = checkpoint.plain_backbone(folder, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(backbone).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        body = {"model": NAME, "input": text, "cache_salt": "exact"}
        answer = httpx.post(f"{server.base_url}/classify", json=body, timeout=60).json()["data"][0]
        torch.testing.assert_close(torch.tensor(answer["probs"]), expected, atol=2e-4, rtol=0)
        assert answer["label"] == LABELS[int(expected.argmax())]


def test_a_burst_leaves_early(server: LocalServer) -> None:
    body = {"model": NAME, "input": TEXTS * 20}
    data = httpx.post(f"{server.base_url}/classify", json=body, timeout=300).json()["data"]
    assert len(data) == 60
    assert [item["label"] for item in data[:3]] == ["positive", "negative", "negative"]
    ran = parse_rung_counts(httpx.get(f"{server.base_url}/metrics", timeout=30).text)
    assert sum(count for rung, count in ran.items() if rung.startswith("exit")) > 30, ran


def questions(count: int) -> list[str]:
    """Asked at a help desk: nothing that the contract was calibrated on is like them."""
    asked = (
        *("How do I reset {}?", "When will {} be ready?", "Where can I find {} after five?"),
        *("What does it cost to replace {}?", "Please tell me whether {} was sent on Monday."),
        *("Does {} need a signature from both of us?", "How long has {} been out of order?"),
    )
    things = (
        *("printer in the hall", "password", "spare key", "second invoice", "tax form", "router"),
        *("parking permit", "water heater", "lost parcel", "train to the coast", "book"),
    )
    whose = ("the", "my", "our", "your", "that", "his", "her")
    every = [a.format(f"{w} {t}") for a, w, t in itertools.product(asked, whose, things)]
    return random.Random(0).sample(every, count)


def test_texts_of_another_kind_raise_the_alarm(server: LocalServer) -> None:
    body = {"model": NAME, "input": questions(WINDOW)}
    httpx.post(f"{server.base_url}/classify", json=body, timeout=600).raise_for_status()
    assert samples(server.base_url, "revmux:contract_drift")[""] >= 1
    assert "requests leave elsewhere" in server.log_path.read_text()
    shadows = samples(server.base_url, "revmux:shadow_requests_total", "answer")
    assert WINDOW / 50 < sum(shadows.values()) < WINDOW / 5
    assert samples(server.base_url, "revmux:contract_agreement", "bound")["low"] > 0.8
