"""The index arithmetic of a step, against a plain-Python reading of the same plan."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm.engine.layout import make_layout
from revmux_vllm.engine.transfer import sent
from revmux_vllm.planning.packing import pack
from revmux_vllm.rungs import Ends, Rung


def merged(length: int, factor: int, ends: Ends) -> list[list[int]]:
    """Tokens of every row of a sequence, the slow way."""
    tokens = list(range(length))
    if factor == 1:
        return [[token] for token in tokens]
    last = [] if ends.pools_first else [[tokens.pop()]]
    first = [[tokens.pop(0)]] if tokens and (ends.pools_first or ends.has_sink) else []
    return [*first, *(tokens[i : i + factor] for i in range(0, len(tokens), factor)), *last]


# Long because it reads every index of one layout off one plan.
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=24),
    widths=st.sets(st.sampled_from([2, 3, 4, 8])),
    merges=st.lists(st.integers(1, 3), min_size=24, max_size=24),
    leaving=st.lists(st.booleans(), min_size=24, max_size=24),
    stops=st.lists(st.sampled_from([0, 0, 5, 7]), min_size=24, max_size=24),
    ends=st.builds(Ends, st.booleans(), st.booleans()),
)
def test_rows_follow_the_plan(
    lengths: list[int],
    widths: set[int],
    merges: list[int],
    leaving: list[bool],
    stops: list[int],
    ends: Ends,
) -> None:
    packed = pack(lengths, widths)
    groups = [
        (Rung(m, len(g), stop=stop), g) for m, stop, g in zip(merges, stops, packed, strict=False)
    ]
    # Some of those that are alone exit.
    exits = {
        g[0]
        for (rung, g), leaves in zip(groups, leaving, strict=False)
        if rung == Rung() and leaves
    }
    all_groups = [(Rung(exit=True) if g[0] in exits else rung, g) for rung, g in groups]
    groups = [(rung, g) for rung, g in all_groups if not rung.exit]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    layout = make_layout(all_groups, starts, ends)
    left = [part for part in layout.rungs if part.rung.exit]
    assert {row for part in left for row in part.sequence.tolist()} == exits

    # Of every upper row: its rung, and of every member the token rows that it takes part with.
    expected: list[tuple[Rung, int, list[list[int]]]] = []
    read: dict[int, int] = {}
    in_order = sorted(groups, key=lambda item: (-(item[0].stop or 99), item[0]))
    for rung, group in in_order:
        own = [merged(lengths[m], rung.merge, ends) for m in group]
        for member, rows in zip(group, own, strict=True):
            read[member] = len(expected) + (0 if ends.pools_first else len(rows) - 1)
        for place in range(len(own[0])):
            rows = [
                [int(starts[m]) + t for t in rows[place]] if place < len(rows) else []
                for m, rows in zip(group, own, strict=True)
            ]
            expected.append((rung, place, rows))
            last = own[0][place][-1]
            assert layout.positions[len(expected) - 1] == last
            assert layout.carrier_rows[len(expected) - 1] == int(starts[group[0]]) + place
    assert layout.num_rows == len(expected)
    for layer in (1, 5, 7):
        going_on = [(rung, group) for rung, group in in_order if (rung.stop or 99) > layer]
        rows = sum(len(merged(lengths[g[0]], rung.merge, ends)) for rung, g in going_on)
        assert layout.passing(layer) == (len(going_on), rows)
    assert layout.places.tolist() == [place for _, place, _ in expected]
    assert layout.alone.tolist() == [rows[0][0] for rung, _, rows in expected if rung == Rung()]
    for part in layout.rungs:
        rows = [rows for rung, _, rows in expected if rung == part.rung]
        assert gathered(part, int(starts[-1])) == rows
        assert part.present.tolist() == [[bool(tokens) for tokens in row] for row in rows]
        if part.read_at is None:
            assert part in left
            continue
        for row, sequence in zip(part.read_at.tolist(), part.sequence.tolist(), strict=True):
            assert read.pop(sequence) == row
        assert_absent_rows_are_the_members_own(part, starts)
        # The first row, unless it is all that a member has.
        firsts = [
            place == 0 and all(len(merged(lengths[m], rung.merge, ends)) > 1 for m in group)
            for rung, group in in_order
            if rung == part.rung
            for place in range(len(merged(lengths[group[0]], rung.merge, ends)))
        ]
        mixed_sinks = firsts if ends.has_sink else None
        sinks = None if part.sinks is None else part.sinks.tolist()
        assert sinks == (mixed_sinks if part.rung.mux > 1 else None)
        streams = part.stream.reshape(-1, part.rung.mux).tolist()
        assert streams == [list(range(part.rung.mux))] * len(streams)
    assert sorted(read) == sorted(group[0] for rung, group in groups if rung == Rung())
    pooled = starts[:-1] if ends.pools_first else starts[1:] - 1
    assert layout.pooled_token.tolist() == pooled.tolist()


def gathered(part: Any, num_tokens: int) -> list[list[list[int]]]:
    """Token rows of every member of every upper row, read off the indices as the model does."""
    source = [[token] for token in range(num_tokens)]
    if part.tokens is not None:
        source = [
            [t for t, there in zip(row, merged, strict=True) if there]
            for row, merged in zip(part.tokens.tolist(), part.merged.tolist(), strict=True)
        ]
    return [
        [source[row] if there else [] for row, there in zip(rows, present, strict=True)]
        for rows, present in zip(part.rows.tolist(), part.present.tolist(), strict=True)
    ]


def assert_absent_rows_are_the_members_own(part: Any, starts: np.ndarray) -> None:
    """What is masked is read all the same: nothing of others, and nothing behind the batch."""
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    tokens = np.arange(starts[-1])[:, None] if part.tokens is None else part.tokens
    members = owner[tokens[part.rows]]  # (R, N, M)
    assert (members == members[:, :, :1]).all()
    composites = {tuple(row) for row in part.sequence.reshape(-1, part.rung.mux).tolist()}
    assert {tuple(row) for row in members[:, :, 0].tolist()} == composites


def test_a_step_reaches_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    to = torch.Tensor.to

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copies.append(tensor.nbytes)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    groups = [
        (Rung(), (0,)),
        (Rung(mux=2), (2, 1)),
        (Rung(2, 2), (3, 4)),
        (Rung(merge=2), (5,)),
        (Rung(exit=True), (6,)),
    ]
    layout = make_layout(groups, np.array([0, 3, 5, 9, 20, 25, 26, 30]), Ends(has_sink=True))
    there = sent(layout, torch.device("cpu"))
    assert len(copies) == 1
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(there)}
    assert len(storages) == 1
    for host, tensor in zip(arrays(layout), tensors(there), strict=True):
        assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(host)))
        assert tensor.dtype == torch.from_numpy(host[:0]).dtype


def arrays(layout: Any) -> list[np.ndarray]:
    """Of a layout and its rungs, without those that stay on the host."""
    return _of_type(layout, np.ndarray)


def tensors(layout: Any) -> list[torch.Tensor]:
    """Of a layout that was sent, and of its rungs."""
    return _of_type(layout, torch.Tensor)


def _of_type(record: Any, kind: type) -> list[Any]:
    found = []
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, tuple):
            found += [one for part in value for one in _of_type(part, kind)]
        elif isinstance(value, kind) and not field.metadata.get("host"):
            found.append(value)
    return found


@pytest.mark.parametrize("groups", [[(0,)], [(0, 1), (1,)], [(0, 1), (2,)]])
def test_a_plan_for_another_batch_is_refused(groups: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="do not cover the batch's 2 rows once"):
        make_layout(
            [(Rung(mux=len(group)), group) for group in groups], np.array([0, 3, 5]), Ends()
        )


def test_a_carrier_must_be_the_longest() -> None:
    with pytest.raises(ValueError, match="longer than its carrier"):
        make_layout([(Rung(mux=2), (0, 1))], np.array([0, 2, 5]), Ends())
