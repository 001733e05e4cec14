"""One server under one load: the client, with a stand-in for ``vllm``, and what is read back."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from revmux_vllm.bench import metrics
from revmux_vllm.bench.client import ClientError, Load, Outcome, client_command, run_client
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import Snapshot
from revmux_vllm.bench.servers import server_pair
from revmux_vllm.bench.target import split
from revmux_vllm.terminal import unwound_on_sigterm

METRICS = """\
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total {cpu}
# TYPE revmux:requests_total counter
revmux:requests_total{{engine="0",rung="mux:4"}} {requests}
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{{engine="0",le="0.3"}} {requests}
vllm:request_queue_time_seconds_sum{{engine="0"}} {queue}
vllm:request_queue_time_seconds_count{{engine="0"}} {requests}
# TYPE vllm:request_inference_time_seconds histogram
vllm:request_inference_time_seconds_sum{{engine="0"}} 4.0
vllm:request_inference_time_seconds_count{{engine="0"}} 10
"""
RESULT = {
    "completed": 3,
    "num_prompts": 4,
    "duration": 2.0,
    "total_input_tokens": 60,
    "mean_e2el_ms": 20.0,
    "p50_e2el_ms": 15.0,
    "p99_e2el_ms": 50.0,
}


def test_metrics_are_means_over_the_point() -> None:
    before = Snapshot.parse(METRICS.format(cpu=1.0, requests=10, queue=2.0))
    after = Snapshot.parse(METRICS.format(cpu=2.5, requests=30, queue=3.0))
    assert after.means_since(before) == {
        "queue_ms": pytest.approx(50.0),
        "inference_ms": None,  # nothing new
        "server_ms": None,  # not there
    }
    assert after.rungs - before.rungs == {"mux:4": 20}
    assert (before.cpu_s, after.cpu_s) == (1.0, 2.5)


def test_metrics_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [METRICS.format(cpu=1, requests=n, queue=1) for n in (10, 12, 30, 40)]
    before, *looks = map(Snapshot.parse, texts)
    found = iter(looks)
    monkeypatch.setattr(Snapshot, "of", lambda _: next(found))
    assert metrics.settled("", before, 20) == looks[1]


@pytest.mark.parametrize(
    ("queue", "inference", "server", "limit"),
    [
        (900.0, 50.0, 960.0, "engine"),  # waits in the scheduler
        (0.0, 300.0, 650.0, "engine"),  # and for the step that ran: 300 of 350
        (0.0, 100.0, 900.0, "front end"),  # but no longer than a step
        (0.0, 100.0, 150.0, "front end"),
        (None, 100.0, 150.0, None),
    ],
)
def test_the_limit_is_where_the_time_went(
    queue: float | None, inference: float, server: float, limit: str | None
) -> None:
    parts = {"queue_ms": queue, "inference_ms": inference, "server_ms": server}
    found = split(1000.0, parts)
    assert found["limit"] == limit
    assert found["rest_ms"] == (None if queue is None else 1000 - queue - inference)


def test_the_client_s_result_is_read() -> None:
    assert Outcome.from_result(RESULT) == Outcome(2.0, 1.5, 1, 20.0, 20.0, 15.0, 50.0)
    nothing = Outcome.from_result(RESULT | {"completed": 0})
    assert (nothing.errors, nothing.p99_ms, nothing.mean_tokens) == (4, None, None)


def fake_client(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A script in place of ``vllm``."""
    script = folder / "vllm"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_the_client_gets_the_texts_and_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    path = "$(echo $* | grep -o '[^ ]*prompts.jsonl')"
    write = f"echo '{json.dumps(RESULT)}' > $(dirname {path})/result.json"
    fake_client(tmp_path, monkeypatch, f"echo $* > {seen}; cat {path} >> {seen}; {write}")
    load = Load(2.5, 3, burstiness=0.2, max_concurrency=7, seed=4)
    outcome = run_client("http://127.0.0.1:1", "m", ['a "b"', "c"], load, 30)
    assert outcome.p99_ms == 50
    command, *prompts = seen.read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in prompts] == ['a "b"', "c", 'a "b"']
    for option in (
        "--backend vllm-pooling --endpoint /pooling --base-url http://127.0.0.1:1 --model m",
        "--num-prompts 3 --request-rate 2.5 --burstiness 0.2 --seed 4",
        "--max-concurrency 7",
    ):
        assert option in command


def test_vllm_knows_every_option_of_the_client() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    load = Load(2.5, 3, burstiness=0.2, max_concurrency=7, seed=4)
    found = parser.parse_args(client_command("http://127.0.0.1:1", "m", Path("f"), load)[3:])
    assert (found.dataset_path, found.request_rate) == ("f/prompts.jsonl", 2.5)
    assert (found.burstiness, found.max_concurrency, found.seed) == (0.2, 7, 4)


def test_a_client_that_fails_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "$(echo $* | grep -o '[^ ]*prompts.jsonl')"
    partly = f"echo '{json.dumps(RESULT)}' > $(dirname {path})/result.json"
    fake_client(tmp_path, monkeypatch, f"{partly}; echo no such endpoint; exit 3")
    with pytest.raises(ClientError, match=r"exited \(3\)\nno such endpoint"):
        run_client("http://127.0.0.1:1", "m", ["a"], Load(1, 1), 30)


def test_a_client_ends_in_time_and_with_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_client(tmp_path, monkeypatch, f"echo $$ > {tmp_path / 'pid'}; exec sleep 60")
    with pytest.raises(ClientError, match="not done in time"):
        run_client("http://127.0.0.1:1", "m", ["a"], Load(1, 1), 0.5)

    def died() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    (tmp_path / "pid").unlink()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_client("http://127.0.0.1:1", "m", ["a"], Load(1, 1), 30, died)
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_servers_differ_in_nothing_but_revmux(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalServer, "__enter__", lambda self: self)
    options = {"revmux": {"rungs": []}}
    with server_pair(str(tiny_checkpoint), ["--dtype", "bfloat16"], options) as (ours, theirs):
        assert "--additional-config" in ours.command
        assert "--additional-config" not in theirs.command
        plain = Path(theirs.model)
        config = json.loads((plain / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        for server in (ours, theirs):
            dtypes = [word for word in server.command if "dtype" in word]
            assert dtypes[-1] == "--dtype", "the user's wins"
    assert not plain.exists()


def test_sigterm_unwinds() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), unwound_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
