"""Which rungs are worth serving."""

from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.options import read_options
from revmux_vllm.planning.worth import Measured, choose_rungs
from revmux_vllm.rungs import Rung, parse_rungs

RUNGS = parse_rungs(["exit", "exit@20", "mux:2", "mux:4", "merge:2@18", "merge:4"])
CONFIG = RevMuxConfig(RUNGS, prefill_layers=8)


def of(speedup: float, agreement: float) -> Measured:
    return Measured(speedup, agreement, distance=0.05)


# What the old recipe gave on a real LLaMA: composites worse than an exit that costs less.
REAL = {
    Rung(exit=True): of(3.75, 0.82),
    Rung(stop=20): of(1.5, 0.968),
    Rung(mux=2): of(1.57, 0.745),
    Rung(mux=4): of(2.21, 0.752),
    Rung(merge=2, stop=18): of(2.0, 0.95),
    Rung(merge=4): of(2.04, 0.866),
}


def test_what_another_rung_beats_or_agrees_too_seldom_is_left_out_and_says_why() -> None:
    choice = choose_rungs(RUNGS, REAL, 0.95)
    assert list(map(str, choice.used)) == ["exit@20", "merge:2@18"]
    assert choice.left_out[Rung(mux=4)] == "agrees 75.2%, below min_agreement 0.95"
    choice = choose_rungs(RUNGS, REAL, 0.7)
    assert list(map(str, choice.used)) == ["exit@20", "exit", "merge:2@18", "merge:4"]
    assert choice.left_out[Rung(mux=2)] == "exit is no slower and agrees 82.0% to 74.5%"
    assert "Left out: mux:2: " in str(choice)


def test_what_was_never_measured_is_not_served() -> None:
    choice = choose_rungs(RUNGS, {}, 0.95)
    assert choice.used == ()
    assert "`revmux eval FOLDER --eval ROWS --save`" in str(choice)
    some = choose_rungs(RUNGS, {Rung(mux=2): of(1.5, 0.97)}, 0.95)
    assert some.used == (Rung(mux=2),)
    assert some.left_out[Rung(mux=4)] == "not measured"


def test_without_a_floor_all_but_exit_are_used_as_ever() -> None:
    def used(options: dict[str, object], measured: object = REAL) -> set[str]:
        return set(map(str, read_options({"revmux": options}, CONFIG, measured).rungs))  # type: ignore[arg-type]

    everything = {"exit@20", "mux:2", "mux:4", "merge:2@18", "merge:4"}
    assert used({"min_agreement": 0}) == everything
    assert used({"min_agreement": 0, "rungs": ["exit", "mux:2"]}) == {"exit", "mux:2"}
    assert used({}, None) == everything, "random weights are not asked"
    assert used({}) == {"exit@20", "merge:2@18"}
    assert used({"rungs": ["merge:4", "exit@20"]}) == {"exit@20"}
    assert used({"min_agreement": 0.8, "rungs": ["exit"]}) == {"exit"}
    fixed = read_options({"revmux": {"policy": "fixed:mux:4"}}, CONFIG, REAL)
    assert Rung(mux=4) in fixed.rungs, "who names a rung gets it"


@given(
    st.dictionaries(
        st.sampled_from(RUNGS),
        st.builds(of, st.integers(1, 4).map(float), st.sampled_from([0.9, 0.95, 0.97, 1.0])),
        min_size=1,
    )
)
def test_a_better_rung_is_always_there_for_one_left_out(measured: dict[Rung, Measured]) -> None:
    choice = choose_rungs(measured, measured, 0.95)
    assert {*choice.used, *choice.left_out} == set(measured)
    for rung in choice.left_out:
        own = measured[rung]
        assert own.agreement < 0.95 or any(
            measured[u].speedup >= own.speedup and measured[u].agreement >= own.agreement
            for u in choice.used
        )
    ordered = sorted((measured[rung] for rung in choice.used), key=lambda one: one.speedup)
    agreements = [one.agreement for one in ordered]
    assert agreements == sorted(agreements, reverse=True), "faster means less sure, else no use"
    assert len({one.speedup for one in ordered}) == len(ordered)
