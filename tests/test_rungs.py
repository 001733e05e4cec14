"""The grammar of rungs, and that every kind of rung saves the rows that it says."""

import numpy as np
import pytest
import torch
from conftest import save_backbone

from revmux_vllm import rungs
from revmux_vllm.adapters.kinds import PATHS, AdapterLadder
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.config import RevMuxConfig, layer_limit
from revmux_vllm.engine.layout import make_layout
from revmux_vllm.rungs import Ends, Rung, in_words, row_counts
from revmux_vllm.training.cost import Costs

TOKENS = 120
EXAMPLES = [
    Rung.parse(kind.form.replace("N", str(n)) + stop)
    for kind in rungs.GRAMMAR
    for n in ((2, 4) if "N" in kind.form else (2,))
    for stop in (("", "@5") if kind in rungs.TRAINED else ("",))
]
REDUCED = [rung for rung in EXAMPLES if rung not in (Rung(), Rung(sure=True))]
each = pytest.mark.parametrize("rung", REDUCED, ids=str)


def test_every_row_of_the_grammar_writes_its_own_kind() -> None:
    assert {rung.kind for rung in EXAMPLES} == set(rungs.GRAMMAR)
    assert all(Rung.parse(str(rung)) == rung for rung in EXAMPLES)
    assert set(PATHS) == set(rungs.TRAINED)
    assert all(kind.form in in_words() for kind in PATHS)
    assert len({rung.way for rung in EXAMPLES if rung.mux == 1}) == 8, "and two of merge"


@each
def test_the_layout_has_the_rows_that_the_rung_says(rung: Rung) -> None:
    groups = [(rung, tuple(range(rung.mux)))]
    ends = Ends(has_sink=True)
    layout = make_layout(groups, np.arange(rung.mux + 1) * TOKENS, ends)
    expected = 0 if rung.exit else row_counts(TOKENS, rung.shortening, ends)
    assert layout.num_rows == expected
    passed = layout.passing(2)[1] * 3 + layout.passing(5)[1] * 3  # of the upper six of 8 layers
    assert passed <= 6 * (rung.mux * TOKENS / rung.saving(2, 8) + 2)


@each
def test_the_reference_computes_as_much_less_as_the_rung_says(
    rung: Rung, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Engine and reference could both forget to shorten, and would still agree."""
    folder = tmp_path_factory.mktemp("backbone")
    save_backbone("llama", folder, num_layers=8)
    backbone = load_backbone(folder, 2)
    torch.manual_seed(0)
    ladder = AdapterLadder(RevMuxConfig((rung,), prefill_layers=2, adapter_hidden_size=8), 64)
    limit = layer_limit(rung, 2, 8)
    speedup = Costs(backbone, TOKENS).speedup(ladder, rung)
    assert 0.85 * limit < speedup
    assert speedup > 1.3
