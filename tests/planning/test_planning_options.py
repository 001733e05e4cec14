"""What ``--additional-config`` may say, and how it is refused."""

from typing import Any

import pytest

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.options import read_options
from revmux_vllm.rungs import parse_rungs

CONFIG = RevMuxConfig(parse_rungs(["mux:2", "mux:4", "merge:2", "exit"]), prefill_layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"linger": 3},
            "unknown key linger; known are adapter_dtype, isolate, linger_ms, max_width, "
            "min_agreement, min_width, policy, rungs, target_ms",
        ),
        ({"max_width": 3}, r"max_width: expected one of \[1, 2, 4\], found 3"),
        ({"max_width": True}, r"max_width: expected one of \[1, 2, 4\], found True"),
        ({"min_width": 3}, r"min_width: expected one of \[1, 2, 4\], found 3"),
        ({"linger_ms": -1}, "linger_ms: expected milliseconds, found -1"),
        ({"linger_ms": "5"}, "linger_ms: expected milliseconds, found '5'"),
        ({"target_ms": 0}, "target_ms: expected milliseconds, above 0, found 0"),
        ({"min_agreement": 95}, "min_agreement: expected a share, 0 to 1, found 95"),
        ({"isolate": 1}, "isolate: expected true or false, found 1"),
        (
            {"policy": "fixed:8"},
            "policy: expected one of load, off, fixed:mux:2, fixed:mux:4, fixed:merge:2, fixed:2, "
            "fixed:4, found 'fixed:8'",
        ),
        ({"policy": 4}, "policy: expected one of load, off, .*found 4"),
        (
            {"rungs": ["mux:8"]},
            "rungs: the checkpoint has no mux:8; it has exit, mux:2, mux:4, merge:2",
        ),
        ({"rungs": ["x"]}, "rungs: rung 'x': expected exit, mux:N"),
        ({"rungs": "mux:2"}, "rungs: expected a list, found 'mux:2'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options({"revmux": options}, CONFIG)


def test_options_of_other_plugins_are_left_alone() -> None:
    assert read_options({"other": {"x": 1}}, CONFIG).policy == "load"
    assert read_options(None, CONFIG).rungs == parse_rungs(["mux:2", "mux:4", "merge:2"])
