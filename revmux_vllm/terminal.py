"""What the commands share: how they print, and how they end on what the user can mend."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from sys import stderr
from typing import Annotated, NoReturn, Self, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from revmux_vllm.errors import UserError

T = TypeVar("T")
LINE_EVERY_S = 20.0
PLOTS = (".png", ".svg", ".pdf")
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Folder = Annotated[Path, typer.Argument(help="Checkpoint folder, or a bundled name.")]


def make_console(stderr: bool = False) -> Console:
    """Prints names of classes and folders as they are: no markup, no ``:train:`` as a picture."""
    return Console(stderr=stderr, markup=False, emoji=False)


class Watch:
    """How far a long work is: a bar on a terminal, elsewhere a line now and then.

    Args:
        console: to write to.
        what: is done.
        total: how much there is to do.
        done: how much of it was done before.
    """

    def __init__(self, console: Console, what: str, total: int, done: int = 0) -> None:
        self.console, self.what, self.total, self.done = console, what, total, done
        self._began, self._before = time.monotonic(), done
        self._next_line = self._began + LINE_EVERY_S
        self._bar = Progress(
            SpinnerColumn(),
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "left:",
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        self._bar.update(self._task, completed=self.done)
        now = time.monotonic()
        if not self._bar.disable or (now < self._next_line and self.done < self.total):
            return
        self._next_line = now + LINE_EVERY_S
        seconds = (now - self._began) * (self.total - self.done) / (self.done - self._before or 1)
        left = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        self.say(
            f"{self.what}: {self.done} of {self.total}"
            + (f", {left} left" if self.done < self.total else "")
        )

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True)


def followed(items: Sequence[T], what: str) -> Iterator[T]:
    """``items``, one after the other, watched on standard error."""
    with Watch(make_console(stderr=True), what, len(items)) as watch:
        for item in items:
            yield item
            watch.advance()


def check_plot(path: Path | None) -> None:
    """Raise UserError unless ``path`` is None or ends as a picture does."""
    if path is not None and path.suffix not in PLOTS:
        raise UserError("`plot`", expected=f"a file ending in {', '.join(PLOTS)}", found=path)


def as_flag(name: str) -> str:
    """An option as it is typed: ``--hold-out``."""
    return f"--{name.replace('_', '-')}"


@contextmanager
def mendable_errors(advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """What the user can mend ends the command with one message and status 2.

    That is a ``UserError``, what the operating system says of a file, and Ctrl-C. Everything else
    is a bug and keeps its traceback.

    Args:
        advice: what to add where the work stopped half way: how it goes on.
    """

    def stopped(message: str) -> NoReturn:
        fail(". ".join(part for part in (message, advice()) if part))

    try:
        yield
    except UserError as error:
        fail(error.words(as_flag, typed=True))
    except OSError as error:
        if error.errno is None:  # not said by the operating system
            raise
        stopped(str(error))
    except KeyboardInterrupt:
        print(file=stderr)  # below the progress bar
        stopped("interrupted")


@contextmanager
def unwound_on_sigterm() -> Iterator[None]:
    """SIGTERM and SIGINT raise KeyboardInterrupt inside, so that servers are stopped.

    By default SIGTERM ends Python without unwinding, and the servers would live on; shells start
    background jobs with SIGINT ignored.
    """
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: lambda *_: signal.raise_signal(signal.SIGINT),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(message: str) -> NoReturn:
    """End the command with status 2 and ``message`` on standard error."""
    text = Text.assemble(("error: ", "bold red"), message)
    make_console(stderr=True).print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
