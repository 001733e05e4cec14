"""Something that runs in a process of its own, and is asked over a pipe.

Every engine of the kit, and every check that loads compiled code, is a child: what crashes, hangs
or changes the environment there leaves the kit and the other items alone. What a child prints goes
to a log of its own.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TAIL_LINES = 40


class ChildError(RuntimeError):
    """A child failed, ended or gave no answer; the text ends with its log's last lines."""


class Child:
    """An object in a process of its own.

    Args:
        make: makes the object there; must be importable.
        args: of ``make``.
        log: file for all that the process and its children print.
        environ: variables that are set before anything else is imported there.
        timeout_s: for ``make``.

    Raises:
        ChildError: if ``make`` fails or takes longer.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *args: Any,
        log: Path,
        environ: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        own = (there, str(log), dict(environ or {}), make, args)
        self._process = context.Process(target=_serve, args=own)
        self._process.start()
        there.close()
        try:
            self._answer("start", timeout_s)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any, timeout_s: float = 600.0) -> Any:
        """What the object's ``method`` returns. Raises ChildError if it fails or takes longer."""
        try:
            self._here.send((method, args))
        except OSError:
            raise self._error(f"{method}: the process had ended") from None
        return self._answer(method, timeout_s)

    def close(self, patience_s: float = 15.0) -> None:
        """End the process, by force if it does not come to an end by itself. Idempotent.

        All that it started goes with it: a worker of vLLM can outlive an engine that is ended.
        """
        if self._here.closed:
            return
        self._here.close()
        group = self._process.pid
        assert group is not None, "it was started"
        self._process.join(patience_s)
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(15)
        with suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(group, signal.SIGKILL)

    def _answer(self, what: str, timeout_s: float) -> Any:
        if not self._here.poll(timeout_s):
            self.close(0)  # or a late answer would be taken for that of the next call
            raise self._error(f"{what}: no answer in {timeout_s:.0f} s")
        try:
            kind, value = self._here.recv()
        except (EOFError, OSError):
            self._process.join(15)
            status = self._process.exitcode
            raise self._error(f"{what}: the process ended with status {status}") from None
        if kind == "error":
            raise self._error(f"{what}: {value}")
        return value

    def _error(self, what: str) -> ChildError:
        return ChildError(f"{what}\n{self._log} ends with\n{log_tail(self._log)}")


def run_in_child(
    function: Callable[..., Any],
    *args: Any,
    log: Path,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Any:
    """What ``function`` returns in a process of its own. Raises ChildError as ``Child`` does."""
    child = Child(_Job, function, args, log=log, environ=environ, timeout_s=timeout_s)
    try:
        return child.call("run", timeout_s=timeout_s)
    finally:
        child.close()


def log_tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; empty where there is none."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class _Job:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args

    def run(self) -> Any:
        return self.function(*self.args)


def _serve(
    there: Connection,
    log: str,
    environ: dict[str, str],
    make: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The child: the object, then an answer to every call until the other end is closed."""
    os.setsid()  # so that it can be ended with all that it starts
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # the descriptors, for compiled code and processes started from here
        os.dup2(descriptor, stream)
    os.environ.update(environ)
    made: Any = None
    try:
        made = _answered(there, lambda: make(*args), result=False)
        while made is not None:
            method, values = there.recv()
            _answered(there, lambda: getattr(made, method)(*values))  # noqa: B023
    except (EOFError, BrokenPipeError):
        pass  # nobody asks any more
    finally:
        if hasattr(made, "close"):
            made.close()


def _answered(there: Connection, action: Callable[[], Any], result: bool = True) -> Any:
    """What ``action`` returns; it is sent, or only that it went well, or what went wrong."""
    try:
        value = action()
    except Exception as error:  # told to the other end, whatever it is
        traceback.print_exc()
        there.send(("error", f"{type(error).__name__}: {error}"))
        return None
    there.send(("ok", value if result else None))
    return value
