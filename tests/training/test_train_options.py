"""The options of a training are checked, written and compared in one piece."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from revmux_vllm.errors import UserError
from revmux_vllm.rungs import parse_rungs
from revmux_vllm.terminal import as_flag
from revmux_vllm.training.options import MAY_CHANGE, TrainOptions
from revmux_vllm.training.recipes import RECIPES

PLAIN = TrainOptions("a-backbone", "train.tsv", Path("out"))
FULL = TrainOptions(
    "a-backbone",
    "train.jsonl",
    Path("out"),
    eval="dev.jsonl",
    text_columns=("question", "sentence"),
    label_column="answer",
    label_words=(" no", " yes"),
    rungs=parse_rungs(["exit", "merge:2+mux:4"]),
    prefill_layers=3,
    recipe=RECIPES["paper"].with_given(epochs=1.5, copies=None),
    bf16=True,
)


@pytest.mark.parametrize("options", [PLAIN, FULL])
def test_they_are_read_as_they_were_written(options: TrainOptions) -> None:
    assert TrainOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    with pytest.raises(UserError, match="surprise: unknown options"):
        TrainOptions.from_dict(options.to_dict() | {"surprise": 1})


def test_all_mistakes_are_named_at_once() -> None:
    recipe = replace(RECIPES["default"], epochs=0, copies=-1.0)
    with pytest.raises(UserError) as error:
        replace(PLAIN, recipe=recipe, hold_out=1.0, adapter_type="best", label_words=("w",))
    assert error.value.words(as_flag, typed=True).splitlines() == [
        "--epochs 0: expected more than 0",
        "--augment -1: expected at least 0",
        "--hold-out 1: expected a share of the rows, 0 to below 1",
        "--adapter-type best: expected one of revmux, ora, vanilla",
        "--label-words w: expected at least two different words",
    ]
    assert "hold_out: expected a share of the rows, 0 to below 1, found 1.0" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0"),
        ({"prefill_layers": 2}, "prefill_layers was 3"),
        ({"rungs": parse_rungs(["mux:2"])}, "rungs was ['exit', 'merge:2+mux:4']"),
        ({"text_columns": None}, "text_columns was ['question', 'sentence']"),
        ({"recipe": RECIPES["paper"]}, "epochs was 1.5"),
    ],
)
def test_what_a_training_cannot_go_on_with_is_named(change: dict[str, Any], message: str) -> None:
    assert replace(FULL, **change).changes_since(FULL) == [message]


def test_what_is_done_with_the_result_may_change() -> None:
    changes = {"output": Path("b"), "eval": None, "bundle_backbone": True, "store_dtype": "float16"}
    assert changes.keys() == set(MAY_CHANGE)
    assert replace(FULL, **changes).changes_since(FULL) == []


def test_what_a_survey_proposes_fills_in_what_is_open() -> None:
    rungs = parse_rungs(["merge:2"])
    open_cut = replace(FULL, prefill_layers=None)
    assert not PLAIN.is_settled
    assert not open_cut.is_settled
    assert (PLAIN.settled(7, rungs).prefill_layers, PLAIN.settled(7, rungs).rungs) == (7, rungs)
    assert open_cut.settled(7, rungs) == replace(FULL, prefill_layers=7)
    assert FULL.settled(7, rungs) == FULL


def test_the_commands_are_quick_to_import() -> None:
    heavy = "('torch', 'transformers', 'datasets', 'vllm', 'matplotlib')"
    for module in ("revmux_vllm.training.cli", "revmux_vllm.inspection"):
        code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "[]\n", (module, done.stderr)
