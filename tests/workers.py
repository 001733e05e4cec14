"""Options of the suite, and how it is shared among the workers of pytest-xdist."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
LONG = ("test_soak.py", "test_examples.py", "test_parity.py", "test_flagship.py")
"""What takes longest comes first, so that no worker is left alone with it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ``tests/engine/test_soak.py``."""
    parser.addoption(
        "--soak-minutes", type=float, default=1.0, help="how long the soak test loads the server"
    )
    parser.addoption("--soak-report", type=Path, help="JSON file for what the soak test saw")


def pytest_configure() -> None:
    """A worker keeps to its own cores, and so do its servers: on the same ones they would wait for
    each other's spinning threads."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and CORES:
        own = CORES[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, own or CORES)


@contextmanager
def on_all_cores() -> Iterator[None]:
    """This worker, and what it starts, is not kept to its own cores.

    On one core whoever is told that an answer begins runs before the rest of it is sent, so a front
    that is killed is likelier to leave half an answer, which nobody can mend.
    """
    own = CORES and os.sched_getaffinity(0)
    if CORES:
        os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        if own:
            os.sched_setaffinity(0, own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In another order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file share its fixtures, those of Ray Serve its ports: one worker has them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "serving" if "/serving/" in file else file

    return ByFile(config, log)
