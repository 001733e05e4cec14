"""vLLM's own benchmark client, ``vllm bench serve``, as a child process.

It asks ``/pooling``, the one address of a classifier that it knows; what that computes for a model
with a classification head is the classification, number for number what ``/classify`` answers.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm.bench.failures import MeasuringError

POLL_S = 0.2
GRACE_S = 5.0
LOG_LINES = 15
# The client asks through proxies that the environment names; they do not know this machine's ports.
DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class ClientError(MeasuringError):
    """The client failed or did not end; the text holds its last lines."""


@dataclass(frozen=True)
class Load:
    """Requests that arrive by themselves, whether or not earlier ones were answered.

    Attributes:
        rate: arrivals per second; infinite is all at once.
        num_requests: in all.
        burstiness: shape of the gamma distribution of the gaps; 1 is Poisson, less comes in bursts.
        max_concurrency: at most so many under way (a closed loop); None for an open loop.
        seed: of the arrivals.
    """

    rate: float
    num_requests: int
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What the client saw; latencies are None where nothing was answered.

    Attributes:
        achieved: answers per second, from the first arrival to the last answer.
        errors: requests without an answer.
        mean_tokens: of a text, as the server counted them.
    """

    duration_s: float
    achieved: float
    errors: int
    mean_tokens: float | None
    mean_ms: float | None
    p50_ms: float | None
    p99_ms: float | None

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> "Outcome":
        """Read the file that ``--save-result`` writes."""
        completed = result["completed"]
        mean, p50, p99 = (result[f"{key}_e2el_ms"] for key in ("mean", "p50", "p99"))
        return cls(
            duration_s=result["duration"],
            achieved=completed / result["duration"],
            errors=result["num_prompts"] - completed,
            mean_tokens=result["total_input_tokens"] / completed if completed else None,
            mean_ms=mean if completed else None,
            p50_ms=p50 if completed else None,
            p99_ms=p99 if completed else None,
        )


def run_client(
    base_url: str,
    model: str,
    texts: Sequence[str],
    load: Load,
    timeout_s: float,
    on_tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Load a server and return when all is answered. Starting the client takes seconds by itself.

    Args:
        base_url: of the server.
        model: its served name.
        texts: sent in this order, over and over.
        timeout_s: for all of it.
        on_tick: called a few times a second; what it raises ends the client.

    Raises:
        ClientError: if the client fails or time runs out.
    """
    with tempfile.TemporaryDirectory(prefix="revmux-bench-") as scratch:
        folder = Path(scratch)
        log = folder / "client.log"
        with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
            for i in range(load.num_requests):
                file.write(json.dumps({"prompt": texts[i % len(texts)]}) + "\n")
        command = client_command(base_url, model, folder, load)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | DIRECT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the client
            )
        try:
            _wait(process, time.monotonic() + timeout_s, on_tick)
        except TimeoutError as error:
            raise ClientError(f"vllm bench serve: {error}\n{_tail(log)}") from error
        finally:
            _end(process)
        result = folder / "result.json"
        if process.returncode or not result.is_file():
            raise ClientError(f"vllm bench serve: exited ({process.returncode})\n{_tail(log)}")
        return Outcome.from_result(json.loads(result.read_text(encoding="utf-8")))


def client_command(base_url: str, model: str, folder: Path, load: Load) -> list[str]:
    """What is run; the texts are ``prompts.jsonl`` of ``folder``, the answer ``result.json``."""
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve"]
    command += ["--backend", "vllm-pooling", "--endpoint", "/pooling", "--base-url", base_url]
    command += ["--model", model, "--skip-tokenizer-init", "--disable-tqdm"]
    command += ["--dataset-name", "custom", "--dataset-path", str(folder / "prompts.jsonl")]
    command += ["--disable-shuffle", "--num-prompts", str(load.num_requests)]
    command += ["--request-rate", str(load.rate), "--burstiness", str(load.burstiness)]
    command += ["--seed", str(load.seed), "--metric-percentiles", "50,99"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
    if load.max_concurrency is not None:
        command += ["--max-concurrency", str(load.max_concurrency)]
    return command


def _wait(process: subprocess.Popen[bytes], deadline: float, on_tick: Callable[[], None]) -> None:
    while process.poll() is None:
        on_tick()
        if time.monotonic() > deadline:
            raise TimeoutError("not done in time")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # A warning of an extension at every exit, which hides what went wrong.
    lines = [line for line in lines if not line.startswith(("nanobind:", " - "))]
    return "\n".join(lines[-LOG_LINES:])
