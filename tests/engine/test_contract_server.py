"""A server under an accuracy contract: what it says, what it refuses, what it counts."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import make_tiny_checkpoint
from contracts import AGREEMENT, Promised, samples

from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.engine.environment import untouched
from revmux_vllm.planning.watching import TRUST_NAMES

OPTIONS = {"agreement": AGREEMENT, "policy": "fixed:contract", "shadow_rate": 0.5}
NUM_TEXTS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_tiny_checkpoint(tmp_path_factory.mktemp("contract"), rungs="exit,exit@2,exit@3")
    Promised(made)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    args = ["--enforce-eager", "--dtype", "float32", "--served-model-name", "tiny"]
    args += ["--additional-config", json.dumps({"revmux": OPTIONS})]
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_API_KEY": "of-this-test"}
    with untouched(), LocalServer(folder, args, env) as running:
        running.wait_ready(300)
        yield running


def test_what_it_promises_is_said_and_counted(server: LocalServer) -> None:
    assert "RevMUX: accuracy contract 90 %, with confidence 0.95" in server.log_path.read_text()
    texts = [f"w{i % 290 + 5} w{i % 7 + 5} w{i % 31 + 5}" for i in range(NUM_TEXTS)]
    body = {"model": "tiny", "input": texts}
    answer = httpx.post(f"{server.base_url}/classify", json=body, timeout=120).json()
    assert len(answer["data"]) == NUM_TEXTS
    left = samples(server.base_url, "revmux:contract_requests_total", "left")
    assert sum(left.values()) == NUM_TEXTS
    assert set(left) <= {"exit", "exit@2", "exit@3", "alone"}
    ran = samples(server.base_url, "revmux:requests_total", "rung")
    assert sum(ran.values()) == NUM_TEXTS
    came = samples(server.base_url, "revmux:contract_trust_total", "stop")
    assert came["exit"] == NUM_TEXTS, "all come to the first stop"
    assert came["exit"] > came["exit@2"] > came["exit@3"] > 0
    trusts = samples(server.base_url, "revmux:contract_trust_total", "trust")
    assert len(trusts) > 3
    assert set(trusts) <= set(TRUST_NAMES)
    shadows = samples(server.base_url, "revmux:shadow_requests_total", "answer")
    assert 0 < sum(shadows.values()) < NUM_TEXTS
    assert ran["alone"] == left.get("alone", 0) + sum(shadows.values()), "they ran to the end"
    agreement = samples(server.base_url, "revmux:contract_agreement", "bound")
    assert agreement["estimate"] == shadows["same"] / sum(shadows.values())
    assert 0 <= agreement["low"] < agreement["estimate"] < agreement["high"] <= 1
    assert samples(server.base_url, "revmux:contract_drift", "") != {}
    page = (Path(__file__).parents[2] / "docs/accuracy-contract.md").read_text()
    metrics = httpx.get(f"{server.base_url}/metrics", timeout=30).text
    names = set(re.findall(r"\brevmux:\w+", page))
    assert len(names) == 6
    assert all(f"\n{name}{{" in metrics for name in names)


def test_what_a_key_does_not_guard_is_said_once(server: LocalServer) -> None:
    said = "/pooling answer without it. --middleware revmux_vllm.engine.guard.Guard guards them"
    assert server.log_path.read_text().count(said) == 1


def test_another_promise_is_refused_with_the_command(folder: Path) -> None:
    options = json.dumps({"revmux": {"agreement": 0.999}})
    with untouched():
        other = LocalServer(folder, ["--additional-config", options], os.environ)
    with pytest.raises(Exception, match="exited") as died, other:
        other.wait_ready(120)
    assert "revmux calibrate FOLDER --data TEXTS --agreement 0.999" in str(died.value)
    other.log_path.unlink()
