"""What the commands share: how they print, and how they end on what the user can mend."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sys import stderr
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

PLOTS = (".png", ".svg", ".pdf")
RESUME = "An unfinished training keeps its last checkpoint: --resume continues it"


def make_console(stderr: bool = False) -> Console:
    """Prints names of classes and folders as they are: no markup, no ``:train:`` as a picture."""
    return Console(stderr=stderr, markup=False, emoji=False)


def check_plot(path: Path | None) -> None:
    """Raise ValueError unless ``path`` is None or ends as a picture does."""
    if path is not None and path.suffix not in PLOTS:
        raise ValueError(f"--plot {path}: expected a file ending in {', '.join(PLOTS)}")


@contextmanager
def mendable_errors(output: Path | None = None) -> Iterator[None]:
    """What the user can mend ends the command with one message and status 2.

    ``output``: of a training, whose last checkpoint can be continued if there is one.
    """

    def stopped(message: str) -> NoReturn:
        if output is not None:
            from revmux_vllm.checkpoint import WORK_FOLDER
            from revmux_vllm.training.trainer import unfinished

            if unfinished(output / WORK_FOLDER):
                message = f"{message}. {RESUME}"
        fail(message)

    try:
        yield
    except ImportError as error:
        fail(f"{error}; in a clone of this repository `pip install -e '.[train]'` cures it")
    except ValueError as error:
        fail(str(error))
    except OSError as error:
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
