"""Multiplexer and demultiplexer of one width, and the ladder of several."""

import pytest
import torch

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.adapters.mux import ADAPTERS, Demultiplexer, Inverse, Multiplexer, ReversiblyMixed
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung, parse_rungs


def make(adapter_type: str, skip: bool = True) -> tuple[Multiplexer, Demultiplexer]:
    """Both parts of two streams over eight channels."""
    kind = ADAPTERS[adapter_type]
    mux = kind.multiplexer(2, 8)
    return mux, kind.demultiplexer(mux, 8, 8, skip)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@torch.no_grad()
def test_demultiplexing_without_upper_layers_gives_back_each_stream(width: int) -> None:
    """Through identity upper layers the inverse must return what was down-projected."""
    mux = ReversiblyMixed(width, 24).double()
    reader = Inverse(mux, 24, 16, skip=True).double()
    rows, present = torch.randn(5, width, 24).double(), torch.ones(5, width, dtype=torch.bool)
    streams = mux.down_project(rows, present)
    composite = mux.combine(streams)
    seen = {}
    reader.up.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    for stream in range(width):
        index = torch.full((5,), stream)
        reader(composite, index, torch.randn(5, 2, 24).double())
        own = seen["x"][:, : 24 // width]
        torch.testing.assert_close(own, streams[:, stream], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adapter_type", list(ADAPTERS))
@torch.no_grad()
def test_an_ended_member_leaves_no_trace(adapter_type: str) -> None:
    adapter, _ = make(adapter_type)
    rows = torch.randn(3, 2, 8)
    present = torch.tensor([[True, True], [True, False], [True, False]])
    other = rows.clone()
    other[1:, 1] = 1e3
    torch.testing.assert_close(adapter.multiplex(rows, present), adapter.multiplex(other, present))
    assert not torch.equal(adapter.multiplex(rows, present)[0], adapter.multiplex(rows, present)[1])


@pytest.mark.parametrize("adapter_type", list(ADAPTERS))
@pytest.mark.parametrize("skip", [True, False])
@torch.no_grad()
def test_a_members_own_state_speaks_only_through_the_skip(adapter_type: str, skip: bool) -> None:
    _, read = make(adapter_type, skip)
    rows, stream = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    a, b = (read(rows, stream, torch.randn(4, 2, 8)) for _ in range(2))
    assert a.shape == (4, 8)
    assert torch.equal(a, b) is not skip
    assert torch.equal(read(rows, stream, None), a) is not skip
    # Streams of one composite row are told apart.
    assert not torch.allclose(*read(rows[:1].expand(2, 8), stream[:2], None))


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 3 does not divide hidden_size 8"):
        ReversiblyMixed(3, 8)


def test_the_ladder_names_its_rungs() -> None:
    ladder = AdapterLadder(RevMuxConfig(parse_rungs(["mux:2", "merge:2"]), prefill_layers=1), 8)
    assert [str(rung) for rung, _ in ladder.items()] == ["mux:2", "merge:2"]
    assert {tuple(key.split(".")[:2]) for key in ladder.state_dict()} == {
        (part, rung) for part in ("paths", "readers") for rung in ("mux:2", "merge:2")
    }
    with pytest.raises(KeyError, match="no adapter for rung mux:8; there are mux:2, merge:2"):
        ladder[Rung(mux=8)]


def test_rungs_that_differ_in_their_stop_share_a_path() -> None:
    names = ["exit", "exit@3", "mux:2", "mux:2@2", "mux:4", "merge:2@2", "merge:2@3"]
    ladder = AdapterLadder(RevMuxConfig(parse_rungs(names), prefill_layers=1), 8)
    shared = {tuple(str(a.rung) for a in adapters) for _, adapters in ladder.by_path()}
    assert shared == {
        ("exit",),
        ("exit@3",),
        ("mux:2", "mux:2@2"),
        ("mux:4",),
        ("merge:2@2", "merge:2@3"),
    }
    assert ladder[Rung(mux=2)].path is ladder[Rung(mux=2, stop=2)].path
    keys = list(ladder.state_dict())
    assert not [key for key in keys if key.startswith("readers.mux:2") and "coupling" in key]


@torch.no_grad()
def test_sinks_pass_unmixed_and_matched_composites_look_like_rows() -> None:
    path = AdapterLadder(RevMuxConfig(parse_rungs(["mux:2"]), prefill_layers=1), 8)[
        Rung(mux=2)
    ].path
    rows = torch.randn(500, 2, 8) * torch.logspace(-2, 3, 8) + torch.arange(8)
    present = torch.ones(500, 2, dtype=torch.bool)
    sinks = torch.arange(500) % 5 == 0
    path.mux.match(rows)  # type: ignore[union-attr, operator]
    mixed, _ = path.multiplex(rows, present, None)
    for own, theirs in zip(
        torch.std_mean(mixed, 0), torch.std_mean(rows.flatten(0, 1), 0), strict=True
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)
    kept, _ = path.multiplex(rows, present, sinks)
    torch.testing.assert_close(kept[sinks], rows[sinks].mean(1))
    assert torch.equal(kept[~sinks], mixed[~sinks])
