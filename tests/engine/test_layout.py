"""The index arithmetic of a step, against a plain-Python reading of the same plan."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm.engine.layout import make_layout
from revmux_vllm.packing import pack


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=24),
    widths=st.sets(st.sampled_from([2, 3, 4, 8])),
)
def test_rows_follow_the_plan(lengths: list[int], widths: set[int]) -> None:
    groups = pack(lengths, widths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    layout = make_layout(groups, starts)

    expected = []  # (width, position, token row of every member or None) of every upper row
    for group in sorted(groups, key=len):
        for position in range(lengths[group[0]]):
            members = [int(starts[m]) + position if position < lengths[m] else None for m in group]
            expected.append((len(group), position, members))
    assert layout.positions.tolist() == [position for _, position, _ in expected]
    assert layout.carrier_rows.tolist() == [members[0] for *_, members in expected]
    assert layout.alone.tolist() == [members[0] for width, _, members in expected if width == 1]
    for part in layout.widths:
        rows = [members for width, _, members in expected if width == part.width]
        ended = int(starts[-1])
        assert part.rows.tolist() == [[ended if r is None else r for r in row] for row in rows]
        assert part.present.tolist() == [[r is not None for r in row] for row in rows]

    read = {}
    for part in layout.widths:
        for row, stream, sequence in zip(part.read_at, part.stream, part.sequence, strict=True):
            read[int(sequence)] = expected[int(row)][2][int(stream)]
    alone = {group[0] for group in groups if len(group) == 1}
    assert read == {i: int(starts[i + 1]) - 1 for i in range(len(lengths)) if i not in alone}
    assert layout.last_token.tolist() == [int(s) - 1 for s in starts[1:]]


@pytest.mark.parametrize("groups", [[(0,)], [(0, 1), (1,)], [(0, 1), (2,)]])
def test_a_plan_for_another_batch_is_refused(groups: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="do not cover the batch's 2 rows once"):
        make_layout(groups, np.array([0, 3, 5]))


def test_a_carrier_must_be_the_longest() -> None:
    with pytest.raises(ValueError, match="longer than its carrier"):
        make_layout([(0, 1)], np.array([0, 2, 5]))
