"""The coupling is exactly invertible, whatever N, dtype, size and mode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revmux_vllm.adapters.coupling import ReversibleCoupling, coupling_mlp

# Error of one forward and inverse relative to the largest value met on the way: each of the N
# links rounds a few times in the dtype's epsilon.
EPSILONS_PER_LINK = 8


def strong_mlp(size: int) -> torch.nn.Module:
    """A coupling function far from the near-zero start."""
    mlp = coupling_mlp(size, 2 * size + 1)
    torch.nn.init.normal_(mlp[-1].weight, std=size**-0.5)
    return mlp


def assert_round_trip(
    coupling: ReversibleCoupling, x: torch.Tensor, first: str, second: str
) -> None:
    there = getattr(coupling, first)(x)
    back = getattr(coupling, second)(there)
    scale = max(x.abs().max().item(), there.abs().max().item(), 1.0)
    tolerance = EPSILONS_PER_LINK * x.shape[-2] * torch.finfo(x.dtype).eps * scale
    assert (back - x).abs().max().item() <= tolerance


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 9),
    stream_size=st.integers(1, 17),
    leading=st.lists(st.integers(1, 4), max_size=2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_inverse_undoes_forward_and_forward_undoes_inverse(
    width: int,
    stream_size: int,
    leading: list[int],
    dtype: torch.dtype,
    training: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    coupling = ReversibleCoupling(width, stream_size, strong_mlp).to(dtype).train(training)
    x = torch.randn(*leading, width, stream_size).to(dtype)
    assert_round_trip(coupling, x, "forward", "inverse")
    assert_round_trip(coupling, x, "inverse", "forward")


@torch.no_grad()
def test_two_streams_are_the_papers_equations() -> None:
    coupling = ReversibleCoupling(2, 3, strong_mlp)
    f, g = coupling.functions
    x = torch.randn(5, 2, 3)
    # The chain names the streams from the end: x_1 takes F of x_0, then x_0 takes G of the result.
    y1 = x[:, 1] + f(x[:, 0])
    y2 = x[:, 0] + g(y1)
    torch.testing.assert_close(coupling(x), torch.stack([y1, y2], dim=1))


@torch.no_grad()
def test_streams_are_mixed() -> None:
    coupling = ReversibleCoupling(3, 4, strong_mlp)
    x = torch.randn(3, 4)
    changed = x.clone()
    changed[-1] += 1  # the chain starts from the last stream
    assert (coupling(x) - coupling(changed)).abs().amax(-1).gt(1e-3).all()


@pytest.mark.parametrize(("width", "size", "name"), [(1, 4, "width"), (2, 0, "stream_size")])
def test_impossible_shapes_are_refused(width: int, size: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ReversibleCoupling(width, size)


def test_wrong_number_of_streams_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(..., 3, S\), found \(2, 4\)"):
        ReversibleCoupling(3, 4)(torch.zeros(2, 4))
