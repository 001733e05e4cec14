"""Merged tokens: which, and that the untrained module is their mean."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm.adapters.merging import TokenMerge, merged_tokens
from revmux_vllm.adapters.reading import Refiner
from revmux_vllm.rungs import Ends, Rung, parse_rungs


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    factor=st.integers(2, 5),
    ends=st.builds(Ends, st.booleans(), st.booleans()),
)
def test_every_token_is_in_one_row_and_those_kept_alone(
    lengths: list[int], factor: int, ends: Ends
) -> None:
    tokens, num_rows = merged_tokens(torch.tensor(lengths), factor, ends)
    for own, count, length in zip(tokens.tolist(), num_rows.tolist(), lengths, strict=True):
        rows = [[token for token in row if token >= 0] for row in own]
        assert [token for row in rows for token in row] == list(range(length)), "in order, once"
        assert all(rows[:count])
        assert not any(rows[count:])
        kept = {0} if ends.pools_first else {length - 1} | ({0} if ends.has_sink else set())
        assert all([token] in rows for token in kept)
        others = [row for row in rows[:count] if not kept.intersection(row)]
        assert all(len(row) == factor for row in others[:-1])
        assert all(row[0] == own[i][0] for i, row in enumerate(rows[:count])), "first slot first"


@torch.no_grad()
def test_untrained_it_is_the_mean_of_what_is_there() -> None:
    merge, rows = TokenMerge(3, 8, 4), torch.randn(3, 3, 8)
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    expected = torch.stack([rows[0].mean(0), rows[1, :2].mean(0), rows[2, 0]])
    torch.testing.assert_close(merge(rows, present), expected)
    vectors = torch.randn(2, 8)
    assert torch.equal(
        Refiner(8, 4, skip=True)(vectors, torch.zeros(2).long(), torch.randn(2, 2, 8)), vectors
    )


@torch.no_grad()
def test_what_is_not_there_leaves_no_trace_and_a_row_alone_stays() -> None:
    merge = TokenMerge(2, 8, 4)
    for parameter in merge.parameters():
        parameter.normal_()
    rows, present = torch.randn(2, 2, 8), torch.tensor([[True, True], [True, False]])
    other = rows.clone()
    other[1, 1] = 1e3
    assert torch.equal(merge(rows, present), merge(other, present))
    assert torch.equal(merge(rows, present)[1], rows[1, 0])
    other[0, 1] = 1e3
    assert not torch.equal(merge(rows, present)[0], merge(other, present)[0])


def test_names_of_rungs() -> None:
    texts = ["mux:4", "mux:2", "merge:2+mux:2", "merge:3", "exit", "merge:3@4", "exit@4"]
    rungs = parse_rungs(texts)
    assert list(map(str, rungs)) == [
        "exit@4",
        "exit",
        "mux:2",
        "mux:4",
        "merge:2+mux:2",
        "merge:3",
        "merge:3@4",
    ]
    assert [rung.saving(2, 8) for rung in rungs] == [3, math.inf, 2, 4, 4, 3, 9]
    assert Rung.parse(str(Rung())) == Rung()
    with pytest.raises(ValueError, match="the backbone itself"):
        parse_rungs(["mux:2", "alone"])
    with pytest.raises(ValueError, match="no such rung"):
        Rung(merge=2, exit=True)
    for text in (
        "mux:1",
        "mux:2+merge:2",
        "merge:2mux:2",
        "",
        "merge:2+",
        "mux:02",
        "exit+mux:2",
        "exit@0",
        "alone@3",
        "mux:2@",
        "merge:2@03",
    ):
        with pytest.raises(ValueError, match="expected exit, mux:N, merge:N or"):
            Rung.parse(text)
