"""The ``revmux`` object: every mistake is named, with what was expected and found."""

import math
import subprocess
import sys
from typing import Any

import pytest

from revmux_vllm.config import RevMuxConfig, layer_limit

GOOD: dict[str, Any] = {
    "format_version": 1,
    "widths": [2, 4],
    "prefill_layers": 3,
    "adapter_type": "revmux",
    "backbone": None,
}


def test_it_round_trips() -> None:
    config = RevMuxConfig.from_dict(GOOD)
    assert RevMuxConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 2}, "revmux.width: unknown key; known are"),
        ({"widths": [1, 2]}, r"revmux.widths: expected integers of at least 2, found \[1, 2\]"),
        ({"widths": []}, "revmux.widths: expected"),
        ({"widths": 2}, "revmux.widths: expected a list, found 2"),
        ({"widths": [4, 2]}, "revmux.widths: expected ascending"),
        ({"prefill_layers": 0}, "revmux.prefill_layers: expected at least 1, found 0"),
        ({"prefill_layers": "3"}, "revmux.prefill_layers: expected at least 1, found '3'"),
        ({"adapter_type": "magic"}, "expected one of revmux, ora, vanilla, found 'magic'"),
        ({"skip": 1}, "revmux.skip: expected true or false, found 1"),
        ({"label_words": ["yes"]}, "revmux.label_words: expected at least two different words"),
        ({"label_words": "yes"}, "revmux.label_words: expected at least two different words"),
        ({"format_version": 7}, "revmux.format_version: expected 1, found 7"),
        ({"backbone": 5}, "revmux.backbone: expected a path or hub id, found 5"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RevMuxConfig.from_dict(GOOD | change)


@pytest.mark.parametrize("key", ["widths", "prefill_layers", "adapter_type", "format_version"])
def test_missing_keys_are_named(key: str) -> None:
    values = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(ValueError, match=f"revmux.{key}: missing"):
        RevMuxConfig.from_dict(values)


def test_all_mistakes_are_raised_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)widths.*prefill_layers"):
        RevMuxConfig.from_dict(GOOD | {"widths": [1], "prefill_layers": -1})
    with pytest.raises(ValueError, match=r"(?s)4 does not divide.*hidden_size 6.*fewer than"):
        RevMuxConfig.from_dict(GOOD).check_backbone(hidden_size=6, num_layers=3)


def test_layer_limit() -> None:
    assert layer_limit(2, 6, 12) == pytest.approx(4 / 3)
    assert layer_limit(4, 3, 12) == pytest.approx(16 / 7)
    assert layer_limit(8, 3, 24) == pytest.approx(64 / 15)
    assert math.isclose(layer_limit(1, 3, 12), 1)


def test_importing_the_package_needs_neither_vllm_nor_ray() -> None:
    code = "import sys, revmux_vllm; print([m for m in ('vllm', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
