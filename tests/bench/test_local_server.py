"""``LocalServer`` with a stand-in for ``vllm``: a shell script beside a made-up Python."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from revmux_vllm.bench.local_server import LocalServer, ServerError

READY = """\
sleep 300 &
echo "$!" > "{folder}/child"
exec "{python}" -c '
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
' "$@"
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script where ``LocalServer`` looks for ``vllm``."""

    def install(body: str) -> None:
        script = tmp_path / "vllm"
        body = body.replace("{folder}", str(tmp_path)).replace("{python}", sys.executable)
        script.write_text(f"#!/bin/sh\n{body}")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return install


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie has ended too
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_ready_server_is_stopped_with_its_children(
    fake_vllm: Callable[[str], None], tmp_path: Path
) -> None:
    fake_vllm(READY)
    with LocalServer("model") as server:
        server.wait_ready(timeout_s=60)
        child = int((tmp_path / "child").read_text())
        assert is_running(child)
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)
    assert not server.is_ready()
    assert not server.log_path.exists()
    server.stop()


def test_a_server_that_dies_is_reported_with_its_log(fake_vllm: Callable[[str], None]) -> None:
    fake_vllm('echo "arguments: $@"; echo "no such model" >&2; exit 3\n')
    with (
        pytest.raises(ServerError, match=r"model: exited \(3\)(?s:.)*--eager\nno such model"),
        LocalServer("model", ["--eager"]) as server,
    ):
        server.wait_ready(timeout_s=60)
    assert server.log_path.exists()
    server.log_path.unlink()


def test_waiting_has_an_end(fake_vllm: Callable[[str], None]) -> None:
    fake_vllm("sleep 300\n")
    ticks: list[int] = []
    server = LocalServer("model")
    with pytest.raises(ServerError, match="not ready after 1 s"), server:
        server.wait_ready(timeout_s=1, on_tick=lambda: ticks.append(1))
    assert ticks
    server.log_path.unlink()


def test_a_server_must_be_started() -> None:
    server = LocalServer("model")
    with pytest.raises(ServerError, match="not started"):
        server.wait_ready()
    server.log_path.unlink()
