"""A layer that sees a window counts it in the rows that it runs on, in training and served.

Of tokens at the bottom, of merged rows and of composites' rows above the cut. Texts are longer than
the window, and the upper part has layers of both kinds, which share their metadata.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RecordingEngine, make_tiny_checkpoint, save_backbone
from test_parity import check, reference_of
from word_tokenizers import VOCAB_SIZE

from revmux_vllm.backbones.loading import load_backbone

REACH = 16  # rows to either side, see ``save_backbone``


def long_prompts(seed: int, count: int) -> list[list[int]]:
    """A few of them longer than 2,048 tokens."""
    rng = random.Random(seed)
    longest = 2500 if count < 8 else 400
    return [
        [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(3 * REACH, longest))]
        for _ in range(count)
    ]


def test_the_engine_counts_as_the_reference_does(
    tmp_path: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    rungs = "merge:2,merge:4,mux:2,merge:4+mux:2"
    folder = make_tiny_checkpoint(tmp_path, family="modernbert", rungs=rungs)
    engine, reference = make_engine(folder), reference_of(folder)
    for kind in ("", "merge:2", "merge:4", "mux:2", "merge:4+mux:2"):
        check(engine, reference, kind, make=long_prompts)


@pytest.mark.parametrize("tokens_of_a_row", [1, 4])
@torch.no_grad()
def test_a_row_sees_rows_as_far_as_the_window(tokens_of_a_row: int, tmp_path: Path) -> None:
    """Also where each stands for several tokens, which its rotary position says."""
    save_backbone("modernbert", tmp_path)
    backbone = load_backbone(tmp_path, 1)
    rows = torch.randn(1, 100, backbone.hidden_size)
    other = rows.clone()
    other[0, 50] = torch.randn(backbone.hidden_size)
    lengths = torch.tensor([100])
    positions = torch.arange(100)[None] * tokens_of_a_row
    seen = []
    for layer in range(4):
        before, after = (
            backbone.between(states, lengths, positions, layer, layer + 1)
            for states in (rows, other)
        )
        changed = (before != after).any(-1).squeeze().nonzero().squeeze().tolist()
        seen.append((changed[0], changed[-1]))
    everything, window = (0, 99), (50 - REACH, 50 + REACH)
    assert seen == [everything, window, window, everything]
