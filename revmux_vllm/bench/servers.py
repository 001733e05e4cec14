"""Two servers of one backbone, both up: with RevMUX, and alone under vLLM's own class."""

import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TimeElapsedColumn

from revmux_vllm import bundled, checkpoint
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.engine.environment import untouched
from revmux_vllm.engine.platform import native_dtype

PLAIN = "plain"
# Two servers share one GPU: vLLM checks at start-up that so much of it is free, and does no more
# with this once the cache has a size.
SHARE = "--gpu-memory-utilization=0.1"
# By itself vLLM's cache takes a share of all memory.
PLAIN_ARGS = (SHARE, f"--kv-cache-memory-bytes={1 << 30}")


@contextmanager
def server_pair(
    model: str, extra_args: Sequence[str] = (), additional_config: dict[str, Any] | None = None
) -> Iterator[tuple[LocalServer, LocalServer]]:
    """Start both; they are not ready yet. The first serves ``model``, the second ``plain``.

    Args:
        model: checkpoint folder or bundled name.
        extra_args: options of ``vllm serve`` for both; they win over ours.
        additional_config: for the first alone.
    """
    folder = bundled.resolve(model)
    dtype = f"--dtype={native_dtype()}"
    theirs = [*PLAIN_ARGS, dtype, *extra_args, f"--served-model-name={PLAIN}"]
    with ExitStack() as stack:
        ours = stack.enter_context(multiplexed_server(model, extra_args, additional_config))
        target = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="revmux-plain-")))
        plain = LocalServer(checkpoint.plain_backbone(folder, target), theirs)
        with untouched():
            stack.enter_context(plain)
        yield ours, plain


@contextmanager
def multiplexed_server(
    model: str, extra_args: Sequence[str] = (), additional_config: dict[str, Any] | None = None
) -> Iterator[LocalServer]:
    """The first of ``server_pair`` by itself."""
    bundled.resolve(model)  # put together first, where it is not whole
    dtype = f"--dtype={native_dtype()}"
    args = [SHARE, *([dtype] if Path(model).is_dir() else []), *extra_args]  # a bundled name has it
    if additional_config is not None:
        args += ["--additional-config", json.dumps(additional_config)]
    server = LocalServer(model, args)
    with ExitStack() as stack:
        with untouched():  # it finds nothing that RevMUX has set in this process
            stack.enter_context(server)
        yield server


def wait_for(servers: Sequence[LocalServer], console: Console) -> None:
    """Return once all servers answer. Raises ServerError as soon as one of them has died."""
    for server in servers:
        console.print(shlex.join(server.command), style="dim", soft_wrap=True)
    with progress_bar(console) as progress:
        doing = f"Starting {len(servers)} vLLM server{'s' if len(servers) > 1 else ''}"
        task = progress.add_task(f"{doing}; compiling takes a minute or two the first time")
        for i, server in enumerate(servers):
            server.wait_ready(on_tick=lambda: check_alive(servers))
            progress.update(task, description=f"{i + 1} of {len(servers)} servers ready")


def check_alive(servers: Sequence[LocalServer]) -> None:
    """Raise ServerError if one of them has exited."""
    for server in servers:
        server.check_alive()


def progress_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """What is being done, ``columns``, and for how long."""
    return Progress(
        SpinnerColumn(), "{task.description}", *columns, TimeElapsedColumn(), console=console
    )
