"""Multiplexer and demultiplexer of one width, and the ladder of several."""

import pytest
import torch

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.adapters.mux import ADAPTERS, RevMuxAdapter
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung, parse_rungs


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@torch.no_grad()
def test_demultiplexing_without_upper_layers_gives_back_each_stream(width: int) -> None:
    """Through identity upper layers the inverse must return what was down-projected."""
    adapter = RevMuxAdapter(width, 24, 16).double()
    rows, present = torch.randn(5, width, 24).double(), torch.ones(5, width, dtype=torch.bool)
    streams = adapter.down_project(rows, present)
    composite = adapter.mix(streams) / adapter.scale
    seen = {}
    adapter.up.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    for stream in range(width):
        index = torch.full((5,), stream)
        adapter.demultiplex(composite, index, torch.randn(5, 2, 24).double())
        own = seen["x"][:, : 24 // width]
        torch.testing.assert_close(own, streams[:, stream], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adapter_type", list(ADAPTERS))
@torch.no_grad()
def test_an_ended_member_leaves_no_trace(adapter_type: str) -> None:
    adapter = ADAPTERS[adapter_type](2, 8, 8)
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
    adapter = ADAPTERS[adapter_type](2, 8, 8, skip)
    rows, stream = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    a, b = (adapter.demultiplex(rows, stream, torch.randn(4, 2, 8)) for _ in range(2))
    assert a.shape == (4, 8)
    assert torch.equal(a, b) is not skip
    assert torch.equal(adapter.demultiplex(rows, stream, None), a) is not skip
    # Streams of one composite row are told apart.
    assert not torch.allclose(*adapter.demultiplex(rows[:1].expand(2, 8), stream[:2], None))


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 3 does not divide hidden_size 8"):
        RevMuxAdapter(3, 8, 8)


def test_the_ladder_names_its_rungs() -> None:
    ladder = AdapterLadder(RevMuxConfig(parse_rungs(["mux:2", "merge:2"]), prefill_layers=1), 8)
    assert [str(rung) for rung, _ in ladder.items()] == ["mux:2", "merge:2"]
    assert {key.split(".")[0] for key in ladder.state_dict()} == {"mux:2", "merge:2"}
    with pytest.raises(KeyError, match="no adapter for rung mux:8; there are mux:2, merge:2"):
        ladder[Rung(mux=8)]
