"""The ``revmux`` object: every mistake is named, with what was expected and found."""

import math
import subprocess
import sys
from typing import Any

import pytest

from revmux_vllm.config import RevMuxConfig, layer_limit
from revmux_vllm.rungs import Rung

GOOD: dict[str, Any] = {
    "format_version": 3,
    "rungs": ["mux:2", "mux:4", "merge:2+mux:4"],
    "prefill_layers": 3,
    "adapter_type": "revmux",
    "backbone": None,
}


def test_it_round_trips() -> None:
    config = RevMuxConfig.from_dict(GOOD)
    assert RevMuxConfig.from_dict(config.to_dict()) == config


def test_it_can_be_a_key() -> None:
    """As in ``revmux bench``, also where the backbone has a folder of its own."""
    named = GOOD | {"backbone": "/somewhere", "fingerprint": {"weights": "0"}}
    assert len({RevMuxConfig.from_dict(values) for values in (GOOD, named, named)}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 2}, "revmux.width: unknown key; known are"),
        ({"rungs": ["mux:1"]}, "revmux.rungs: rung 'mux:1': expected exit, mux:N, merge:N or"),
        ({"rungs": ["mux:2+merge:2"]}, "revmux.rungs: rung 'mux:2[+]merge:2': expected"),
        ({"rungs": [2]}, "revmux.rungs: rung 2: expected"),
        ({"rungs": ["mux:2", "mux:2"]}, "revmux.rungs: rung mux:2: there twice"),
        ({"rungs": []}, "revmux.rungs: expected at least one"),
        ({"rungs": 2}, "revmux.rungs: expected a list, found 2"),
        ({"rungs": "mux:2"}, "revmux.rungs: expected a list, found 'mux:2'"),
        ({"prefill_layers": 0}, "revmux.prefill_layers: expected at least 1, found 0"),
        ({"prefill_layers": "3"}, "revmux.prefill_layers: expected at least 1, found '3'"),
        ({"adapter_type": "magic"}, "expected one of revmux, ora, vanilla, found 'magic'"),
        ({"skip": 1}, "revmux.skip: expected true or false, found 1"),
        ({"label_words": ["yes"]}, "revmux.label_words: expected at least two different words"),
        ({"label_words": "yes"}, "revmux.label_words: expected at least two different words"),
        ({"format_version": 7}, "revmux.format_version: expected 3, found 7"),
        ({"backbone": 5}, "revmux.backbone: expected a path or hub id, found 5"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RevMuxConfig.from_dict(GOOD | change)


@pytest.mark.parametrize("key", ["rungs", "prefill_layers", "adapter_type", "format_version"])
def test_missing_keys_are_named(key: str) -> None:
    values = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(ValueError, match=f"revmux.{key}: missing"):
        RevMuxConfig.from_dict(values)


def test_all_mistakes_are_raised_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)rungs.*prefill_layers"):
        RevMuxConfig.from_dict(GOOD | {"rungs": [], "prefill_layers": -1})
    with pytest.raises(ValueError, match=r"(?s)4 does not divide.*hidden_size 6.*fewer than"):
        RevMuxConfig.from_dict(GOOD).check_backbone(hidden_size=6, num_layers=3)


def test_layer_limit() -> None:
    assert layer_limit(Rung(mux=2), 6, 12) == pytest.approx(4 / 3)
    assert layer_limit(Rung(mux=4), 3, 12) == pytest.approx(16 / 7)
    assert layer_limit(Rung(mux=8), 3, 24) == pytest.approx(64 / 15)
    assert layer_limit(Rung(merge=2, stop=9), 6, 12) == pytest.approx(12 / 7.5)
    assert math.isclose(layer_limit(Rung(), 3, 12), 1)


def test_importing_the_package_needs_neither_vllm_nor_ray() -> None:
    code = "import sys, revmux_vllm; print([m for m in ('vllm', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
