"""A server as a child process, for the examples, the tests and the benchmarks."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

from revmux_vllm.bench.failures import MeasuringError

POLL_S = 0.5
GRACE_S = 30.0
SWEEP_S = 2.0


class ServerError(MeasuringError):
    """A server that died or was not ready in time; the text holds its last log lines."""


VLLM = ("vllm", "serve", "--model")
RAY = ("revmux", "serve")


class LocalServer:
    """One ``vllm serve`` on a free port of this machine, alive inside a ``with`` block.

    The command is the one installed beside the running Python. The server leads a process group of
    its own, so Ctrl-C in a terminal does not reach it before ``stop`` does.

    Args:
        model: what follows ``--model``.
        extra_args: further options of ``vllm serve``.
        env: the whole environment of the server; default this process's.
        start: what is run, up to the model: ``VLLM``, or ``RAY`` for ``revmux serve``.

    Attributes:
        base_url: ``http://127.0.0.1:<port>``.
        command: what is run.
        log_path: stdout and stderr of the server; kept when the block ends with an error.
    """

    def __init__(
        self,
        model: str | Path,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start: Sequence[str] = VLLM,
    ) -> None:
        port = _free_port()
        self.model = str(model)
        self.base_url = f"http://127.0.0.1:{port}"
        command, *words = start
        self.command = [str(Path(sys.executable).with_name(command)), *words, self.model]
        self.command += ["--host", "127.0.0.1", "--port", str(port), *extra_args]
        self._env = None if env is None else dict(env)
        handle, name = tempfile.mkstemp(prefix="revmux-server-", suffix=".log")
        os.close(handle)
        self.log_path = Path(name)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "LocalServer":
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if not isinstance(error, Exception):  # Ctrl-C is no error
            self.log_path.unlink(missing_ok=True)

    def is_ready(self) -> bool:
        """Whether ``/health`` answers now."""
        try:
            # trust_env: a proxy that the environment names does not know this machine's ports.
            return httpx.get(f"{self.base_url}/health", timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def check_alive(self) -> None:
        """Raise ServerError if the server has exited, or was never started."""
        status = self._process.poll() if self._process else "not started"
        if status is not None:
            raise self._error(f"exited ({status})")

    def wait_ready(self, timeout_s: float = 600, on_tick: Callable[[], None] | None = None) -> None:
        """Return once the server answers.

        Args:
            timeout_s: how long to wait; compiling takes a minute or two.
            on_tick: called between two looks, about twice a second.

        Raises:
            ServerError: if the server exits first, or time runs out.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            self.check_alive()
            if time.monotonic() > deadline:
                raise self._error(f"not ready after {timeout_s:.0f} s")
            if on_tick is not None:
                on_tick()
            time.sleep(POLL_S)

    def _error(self, what: str) -> ServerError:
        name = f"{Path(self.command[0]).name} serve {self.model}"
        return ServerError(f"{name}: {what}\n{self.log_tail()}\nThe whole log: {self.log_path}")

    def log_tail(self, num_lines: int = 30) -> str:
        """The last lines of the log; empty when there is none."""
        if not self.log_path.exists():
            return ""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def stop(self) -> None:
        """End the server and every process it started. Idempotent.

        SIGTERM goes to the server alone, which then ends its engine in order. What is left of the
        group after ``GRACE_S`` is killed, also when this wait is interrupted.
        """
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            process.terminate()
            process.wait(GRACE_S)
            _wait_for_group(process.pid)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for_group(group: int) -> None:
    """Give the children of a server that has exited ``SWEEP_S`` to follow it."""
    deadline = time.monotonic() + SWEEP_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
