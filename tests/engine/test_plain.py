"""The process of plain vLLM, with a stand-in for the engine in it."""

import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from revmux_vllm.engine import environment, plain
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.engine.plain import PlainEngine

NAME = "VLLM_USE_V2_MODEL_RUNNER"


def tells_its_environment(there: Connection, model: str, options: dict[str, Any]) -> None:
    """In place of ``_serve``: answers with its own value of ``NAME`` and the user's."""
    there.send(None)
    there.recv()
    there.send((0.0, [os.environ.get(NAME), os.environ.get("REVMUX_TEST"), model, options]))


def ends(there: Connection, model: str, options: dict[str, Any]) -> None:
    """In place of ``_serve``: no engine."""
    raise SystemExit(3)


def refuses(there: Connection, model: str, options: dict[str, Any]) -> None:
    """In place of ``_serve``: an engine that does not start."""
    there.send("ValueError('no such dtype')")


@pytest.mark.parametrize(("chosen", "cure"), [("other", "other,revmux"), ("", "revmux")])
def test_a_list_of_plugins_without_ours_is_named(
    chosen: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", chosen)
    with pytest.raises(ValueError, match=f"found '{chosen}'; VLLM_PLUGINS={cure}, or unset it"):
        InProcessEngine("revmux-llama")
    monkeypatch.setenv("VLLM_PLUGINS", cure)
    environment.check_plugins()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process in which no engine was started; put back afterwards."""
    monkeypatch.setattr(environment, "_before", {})
    before = os.environ.pop(NAME, None)
    yield
    os.environ.pop(NAME, None)
    if before is not None:
        os.environ[NAME] = before


def seen_by_a_child(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(plain, "_serve", tells_its_environment)
    engine = PlainEngine("some-folder", dtype="float32")
    try:
        return engine.probabilities([[1]])
    finally:
        engine.close()


def test_what_revmux_sets_does_not_reach_plain_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.set_for_good(NAME, "0")
    monkeypatch.setenv("REVMUX_TEST", "the user's")
    seen = seen_by_a_child(monkeypatch)
    assert seen == [None, "the user's", "some-folder", {"dtype": "float32"}]
    assert os.environ[NAME] == "0", "this process keeps it"


def test_what_the_user_set_reaches_plain_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ[NAME] = "1"
    environment.set_for_good(NAME, "0")
    environment.set_for_good(NAME, "0")
    assert seen_by_a_child(monkeypatch)[0] == "1"
    assert os.environ[NAME] == "0"


@pytest.mark.parametrize(
    ("stand_in", "words"),
    [(ends, "plain vLLM ended with status 3"), (refuses, r"ValueError\('no such dtype'\)")],
)
def test_a_start_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any, words: str
) -> None:
    monkeypatch.setattr(plain, "_serve", stand_in)
    with pytest.raises(RuntimeError, match=words):
        PlainEngine("some-folder")
