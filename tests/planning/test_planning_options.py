"""What ``--additional-config`` may say, and how it is refused."""

from dataclasses import replace
from typing import Any

import pytest

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.contract import Contract
from revmux_vllm.planning.costs import LayerCosts
from revmux_vllm.planning.options import fixed_rung, read_options
from revmux_vllm.planning.planner import savings_of
from revmux_vllm.rungs import Rung, parse_rungs

CONFIG = RevMuxConfig(parse_rungs(["mux:2", "mux:4", "merge:2", "exit"]), prefill_layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"linger": 3},
            "unknown key linger; known are adapter_dtype, agreement, isolate, linger_ms, "
            "max_width, min_agreement, min_width, per_class, policy, probability, rungs, "
            "shadow_rate, target_ms",
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
        ({"agreement": 0.9, "shadow_rate": 2}, "shadow_rate: expected a share, 0 to 1, found 2"),
        ({"rungs": ["contract"]}, "rung contract: it is calibrated, not trained"),
        ({"agreement": 1}, "agreement: expected a share above 0, below 1, found 1"),
        ({"agreement": "99 %"}, "agreement: expected a share above 0, below 1, found '99 %'"),
        ({"agreement": 0.99, "probability": 0}, "probability: expected a share above 0, at most 1"),
        ({"agreement": 0.99, "per_class": 1}, "per_class: expected true or false, found 1"),
        (
            {"probability": 0.1},
            "probability: a term of an accuracy contract; give an agreement too",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options({"revmux": options}, CONFIG)


def test_options_of_other_plugins_are_left_alone() -> None:
    assert read_options({"other": {"x": 1}}, CONFIG).policy == "load"
    assert read_options(None, CONFIG).rungs == parse_rungs(["mux:2", "mux:4", "merge:2"])


CONTRACT = Contract(
    agreement=0.99,
    confidence=0.95,
    probability=None,
    per_class=False,
    stops=(Rung(stop=4),),
    weights=((1.0,),),
    biases=(0.0,),
    thresholds=(3.0,),
    speedup=1.6,
    measured=0.995,
    shares=(0.8,),
    rows=1000,
)


def test_a_contract_is_all_that_load_may_use_but_for_what_is_named() -> None:
    promise = {"agreement": 0.99}
    options = read_options({"revmux": promise}, CONFIG, {}, [CONTRACT])
    assert (options.rungs, options.contract) == ((Rung(sure=True),), CONTRACT)
    named = read_options({"revmux": promise | {"rungs": ["mux:2"]}}, CONFIG, {}, [CONTRACT])
    assert set(named.rungs) == {Rung(mux=2), Rung(sure=True)}, "named ones without being measured"
    fixed = {"policy": "fixed:contract"}
    assert fixed_rung(read_options({"revmux": promise | fixed}, CONFIG, {}, [CONTRACT])).sure
    with pytest.raises(ValueError, match="not calibrated for it, but for nothing: found 0"):
        read_options({"revmux": promise}, CONFIG, {}, [])
    assert read_options({"revmux": promise}, CONFIG).contract is None, "nobody was asked"


def test_what_a_contract_saves_is_what_was_measured() -> None:
    options = read_options({"revmux": {"agreement": 0.99}}, CONFIG, {}, [CONTRACT])
    costs = LayerCosts(3, 8, savings_of(options, CONFIG, 8))
    # 1.6x: five of eight layers' work, so two of the upper five's.
    assert costs.saving(Rung(sure=True)) == pytest.approx(2.5)
    assert costs.saving(Rung(mux=2)) == 2
    nobody = replace(CONTRACT, speedup=0.98)
    assert nobody.saving(2, 8) == 1
    at_once = replace(CONTRACT, speedup=8.0)
    assert at_once.saving(2, 8) == 50
