"""Nothing is read that another rung, other members or another tenant wrote, whatever happens.

vLLM's real scheduler and its manager of blocks; of every place in every layer it is written down
what lies there.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import make_tiny_checkpoint
from contracts import AGREEMENT, Promised
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from lone_scheduler import BLOCK_TOKENS
from stepping import computed_tokens, request
from test_scheduler import Traffic

from revmux_vllm.adapters.merging import merged_tokens
from revmux_vllm.engine.layout import make_layout
from revmux_vllm.engine.prefixes import RowBlocks
from revmux_vllm.planning.packing import MuxPlan
from revmux_vllm.rungs import Ends, Rung

ENDS = Ends(has_sink=True)
TAIL = 2
TEMPLATES = [[20 + i] * 50 for i in range(2)]


class Contents:
    """What lies where.

    Attributes:
        lower: by block and place, all tokens until the one whose state it is, and its tenant.
        upper: likewise, the rung, and of every member all tokens until those of the row.
        found: tokens that were taken from the cache, by rung.
    """

    def __init__(self) -> None:
        self.lower: dict[tuple[int, int], Any] = {}
        self.upper: dict[tuple[int, int], Any] = {}
        self.found: dict[Rung, int] = {}

    def run(self, plan: MuxPlan, output: Any, requests: dict[str, Any], scheduler: Any) -> None:
        """Read and write what a step does: in a layer all is written before any of it is read."""
        names = list(output.num_scheduled_tokens)
        before = computed_tokens(output)
        tokens = {name: tuple(requests[name].prompt_token_ids) for name in names}
        counts = [output.num_scheduled_tokens[name] for name in names]
        cached = np.array([before[name] for name in names], np.int64)
        tables = {name: scheduler.kv_cache_manager.get_block_ids(name)[0] for name in names}
        rows = {name: i for i, name in enumerate(names)}
        groups = [
            (rung, tuple(rows[member] for member in group))
            for rung, group in zip(plan.rungs, plan.groups, strict=True)
        ]
        blocks = RowBlocks(BLOCK_TOKENS, TAIL)
        reads: list[tuple[dict[Any, Any], tuple[int, int], Any]] = []
        layout = make_layout(groups, np.cumsum([0, *counts]), ENDS, cached, blocks)
        for name, first, count in zip(names, cached, counts, strict=True):
            salt = requests[name].cache_salt
            for token in range(first + count):
                place = tables[name][token // BLOCK_TOKENS], token % BLOCK_TOKENS
                own = salt, tokens[name][: token + 1]
                if token < first:
                    reads.append((self.lower, place, own))
                else:
                    self.lower[place] = own
        assert layout.paging is not None
        ordered = [g for g in groups if not g[0].exit]
        carriers = layout.carriers.tolist()
        for at, group in [(carriers.index(group[0]), (rung, group)) for rung, group in ordered]:
            members = [names[i] for i in group[1]]
            reads += self._rows(at, group[0], members, layout, tables, tokens, requests)
        for there, place, own in reads:
            assert there[place] == own, "another prefix's, another rung's, or another composite's"

    def _rows(
        self,
        at: int,
        rung: Rung,
        members: list[str],
        layout: Any,
        tables: dict[str, list[int]],
        tokens: dict[str, tuple[int, ...]],
        requests: dict[str, Any],
    ) -> list[Any]:
        """Write the rows of a composite; what it reads."""
        reads: list[Any] = []
        carrier, factor = members[0], rung.shortening
        kind = Rung() if rung.sure else rung
        all_rows = int(layout.host_lengths[at])
        fresh = int(np.diff(layout.host_starts)[at])
        ends = range(1, all_rows + 1)
        if factor > 1:
            own_tokens, _ = merged_tokens(torch.tensor([len(tokens[carrier])]), factor, ENDS)
            ends = (own_tokens[0].amax(-1) + 1).tolist()
        columns = layout.paging.columns[at]
        salt = requests[carrier].cache_salt
        for row, end in enumerate(ends):
            block = tables[carrier][columns[row // BLOCK_TOKENS]]
            place = block, row % BLOCK_TOKENS
            own = kind, salt, tuple(tokens[member][:end] for member in members)
            if row < all_rows - fresh:
                reads.append((self.upper, place, own))
                self.found[rung] = self.found.get(rung, 0) + factor
            else:
                self.upper[place] = "perhaps" if rung.sure else own
        return reads


class SharedTraffic(Traffic):
    """Requests that begin alike."""

    contents: Contents
    options: ClassVar[dict[str, Any]]
    found: ClassVar[dict[Rung, int]]

    @initialize(
        num_blocks=st.sampled_from([10, 22, 40, 100]),
        priority=st.booleans(),
        most_in_flight=st.sampled_from([1, 2]),
    )
    def start(self, num_blocks: int, priority: bool, most_in_flight: int) -> None:  # type: ignore[override]
        Traffic.start(self, self.options, num_blocks, priority, most_in_flight)
        self.contents = Contents()

    @rule(
        texts=st.lists(
            st.tuples(
                st.sampled_from(TEMPLATES),
                st.sampled_from([0, 5, 16, 20, 32, 40, 48, 50]),
                st.lists(st.integers(1, 2), min_size=1, max_size=14),
            ),
            min_size=1,
            max_size=8,
        ),
        salt=st.sampled_from([None, None, None, "a", "exact"]),
        priority=st.integers(0, 2),
    )
    def arrive(self, texts: list[Any], salt: str | None, priority: int) -> None:
        for template, count, own in texts:
            name = str(len(self.known))
            self.known[name] = request(name, [*template[:count], *own], salt, priority)
            self.scheduler.add_request(self.known[name])

    @precondition(lambda self: len(self.flying) < self.most_in_flight)
    @rule()
    def schedule(self) -> None:
        super().schedule()
        output = self.flying[-1]
        self.contents.run(output.mux_plan, output, self.known, self.scheduler)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "contents"):
            for rung, count in self.contents.found.items():
                self.found[rung] = self.found.get(rung, 0) + count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    folder = make_tiny_checkpoint(root, rungs="mux:2,mux:4,merge:2,merge:3,exit@2")
    Promised(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "rungs"),
    [
        ({"policy": "fixed:4"}, [Rung(mux=2)]),
        ({"policy": "fixed:merge:2"}, [Rung(2)]),
        ({"policy": "fixed:merge:3"}, [Rung(3)]),
        ({"policy": "fixed:contract", "agreement": AGREEMENT}, [Rung(), Rung(sure=True)]),
        ({"policy": "fixed:exit@2"}, [Rung(stop=2)]),
        ({"target_ms": 0.5}, [Rung()]),
    ],
    ids=str,
)
def test_nobody_reads_what_is_not_his(
    options: dict[str, Any], rungs: list[Rung], folder: Path
) -> None:
    own = {"folder": folder, "options": options, "found": {}}
    machine: Any = type("SharedTraffic", (SharedTraffic,), own)
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=30, stateful_step_count=40, deadline=None),
    )
    assert set(rungs) <= set(machine.found), "nothing was shared"
