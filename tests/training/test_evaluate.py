"""``revmux eval`` and ``revmux inspect``, and that evaluation is the reference."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_checkpoint, revmux, save_backbone, write_rows
from transformers import AutoTokenizer
from word_tokenizers import save_pair_tokenizer

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import attention_windows, load_backbone
from revmux_vllm.reference import classify
from revmux_vllm.rungs import Rung
from revmux_vllm.training import data
from revmux_vllm.training.cascade import TARGETS
from revmux_vllm.training.cost import Costs
from revmux_vllm.training.evaluate import group_windows, predict, windows
from revmux_vllm.training.features import extract


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "dev.tsv", 64, 1)


def test_json_alone_on_standard_output(trained: Path, rows: Path) -> None:
    result = revmux(f"eval {trained} --eval {rows} --json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["classes"] == ["LABEL_0", "LABEL_1"]
    assert [row["layer"] for row in report["early_exit"]] == [1, 2, 3]
    assert [row["target"] for row in report["cascade"]] == list(TARGETS)
    for rung, limit in (("mux:2", 1.6), ("mux:4", 16 / 7)):
        row = report["rungs"][rung]
        assert row["prefill_layers"] == 1
        assert row["layer_limit"] == pytest.approx(limit)
        assert row["speedup"] < limit
        assert row["accuracy"]["min"] <= row["accuracy"]["mean"] <= row["accuracy"]["max"]
        hits = row["confusion"][0][0] + row["confusion"][1][1]
        assert hits / 64 == pytest.approx(row["accuracy"]["mean"])
        assert [sum(counts) for counts in row["confusion"]] == pytest.approx([32, 32])
    # What was measured at the end of training is what is measured now.
    assert (
        report["rungs"]["mux:2"]["accuracy"]
        == (checkpoint.read_report(trained)["rungs"]["mux:2"]["accuracy"])
    )


def test_tables_and_plot(trained: Path, rows: Path, tmp_path: Path) -> None:
    result = revmux(f"eval {trained} --eval {rows} --plot {tmp_path / 'plot.png'}")
    assert result.exit_code == 0, result.output
    for part in ("early exit", "mux:4", "merge:2", "precision", "LABEL_1", "plot written"):
        assert part in result.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_unwritable_plot_says_nothing_of_training(
    trained: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = revmux(f"eval {trained} --eval {rows} --plot {tmp_path / 'file' / 'plot.png'}")
    assert result.exit_code == 2
    assert "mux:4" in result.output  # the measurement is not lost
    assert "error:" in result.output
    assert "--resume" not in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--window 3", "64 rows, 3 at a time, never fill a composite of 4"),
        ("--plot picture", "--plot picture: expected a file ending in .png, .svg, .pdf"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    trained: Path, rows: Path, change: str, message: str
) -> None:
    result = revmux(f"eval {trained} --eval {rows} {change}")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_rows_without_labels_cannot_be_measured(trained: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "dev.tsv", 8, 1, labels=False)
    result = revmux(f"eval {trained} --eval {rows}")
    assert result.exit_code == 2
    assert "expected the columns label" in result.output


def test_inspect(trained: Path) -> None:
    facts = json.loads(revmux(f"inspect {trained} --json").stdout)
    state = checkpoint.load_adapters(trained).state_dict()
    count = sum(tensor.numel() for key, tensor in state.items() if ".mux:4." in key)
    assert facts["rungs"]["mux:4"]["parameters"] == count
    assert facts["rungs"]["mux:4"]["accuracy"]["mean"] > 0
    assert facts["backbone"] == "in this folder"
    assert (facts["layers"], facts["prefill_layers"], facts["hidden_size"]) == (4, 1, 64)
    table = revmux(f"inspect {trained}").output
    assert "2.29x" in table
    assert f"{count:,}" in table


def test_inspect_of_a_bundled_name_and_of_nothing() -> None:
    assert json.loads(revmux("inspect revmux-llama --json").stdout)["layers"] == 12
    result = revmux("inspect nothing-here")
    assert result.exit_code == 2
    assert "--resume" not in result.output
    assert "bundled are revmux-llama" in result.output


@pytest.mark.parametrize("rung", ["mux:8", "merge:3", "merge:2+mux:4"])
@torch.no_grad()
def test_batched_prediction_equals_the_reference(rung: str, tmp_path: Path) -> None:
    """Evaluation pads many composites together; the reference runs them one by one."""
    folder = make_tiny_checkpoint(tmp_path, rungs=rung)
    backbone, ladder = load_backbone(folder, 1), checkpoint.load_adapters(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    texts = data.read_rows(write_rows(tmp_path / "rows.tsv", 40, 3), names)
    features = extract(backbone, tokenizer, texts, 256, [1, 3])
    prompts = [tokenizer(text)["input_ids"] for text in texts.texts]
    groups = group_windows(next(windows(40, 40)), features.lengths.tolist(), ladder.config.rungs)
    assert {str(rung) for rung, _ in groups} == {rung}
    torch.testing.assert_close(
        predict(backbone, ladder, features, groups),
        classify(backbone, ladder, prompts, [group for _, group in groups], [r for r, _ in groups]),
        atol=1e-4,
        rtol=1e-4,
    )
    alone = classify(backbone, ladder, prompts, [(i,) for i in range(40)], [Rung()] * 40)
    torch.testing.assert_close(features.logits, alone, atol=1e-4, rtol=1e-4)


def test_costs_count_everything(tiny_checkpoint: Path) -> None:
    """Adapters cost, so the speed-up stays below the layer limit and nears it with no adapter."""
    backbone, ladder = load_backbone(tiny_checkpoint, 1), checkpoint.load_adapters(tiny_checkpoint)
    costs = Costs(backbone, 50)
    assert costs.upper / costs.lower == pytest.approx(3, rel=1e-6)
    speedups = [costs.speedup(ladder, Rung(mux=width)) for width in (2, 4, 8)]
    assert speedups == sorted(speedups)
    assert speedups[0] < 1.6
    head = torch.nn.Flatten()
    assert costs.exit_speedup(head, 2) == pytest.approx(2)


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert"])
def test_attention_costs_what_the_kernels_compute(family: str, tmp_path: Path) -> None:
    """All pairs of rows; of causal layers half of them, of windowed ones those in the window."""
    save_backbone(family, tmp_path)
    backbone = load_backbone(tmp_path, 1)
    config, layers = backbone.config, backbone.num_layers
    half, few, many = backbone.is_causal, 100, 400

    def whole(length: int) -> float:
        costs = Costs(backbone, length)
        return costs.lower + costs.upper

    def expected(length: int) -> float:
        windows = attention_windows(config)
        seen = [length if window is None else min(length, 2 * window) for window in windows]
        return 4 * config.hidden_size * length * sum(seen) / (1 + half)

    # What is of rows alone is four times as much for four times the rows.
    quadratic = whole(many) - 4 * whole(few)
    assert quadratic == pytest.approx(expected(many) - 4 * expected(few), rel=0.02)
    assert expected(many) < layers * 4 * config.hidden_size * many**2 or family == "bert"


def through_both(command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``revmux eval`` says by the reference and through the engine."""
    reference = json.loads(revmux(f"{command} --json").stdout)
    # A process of its own: whatever any worker prints on standard output would show.
    words = [sys.executable, "-m", "revmux_vllm.cli", *command.split(), "--json", "--engine"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return reference, json.loads(done.stdout)


@pytest.mark.parametrize("window", [64, 24])
def test_the_engine_agrees_with_the_reference(trained: Path, rows: Path, window: int) -> None:
    """Windows of 24 leave some over, of composites and of the last window."""
    reference, engine = through_both(f"eval {trained} --eval {rows} --window {window}")
    assert nearly(engine) == nearly(reference)


def nearly(value: Any) -> Any:
    """A report whose probabilities compare equal where they differ by rounding."""
    if isinstance(value, dict):
        return {key: nearly(part) for key, part in value.items()}
    if isinstance(value, list):
        return [nearly(part) for part in value]
    return pytest.approx(value, abs=1e-4, nan_ok=True) if isinstance(value, float) else value


def test_the_engine_answers_with_words_as_the_reference_does(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path, family="t5", rungs="mux:2,merge:2", label_words=("w8", "w7")
    )
    reference, engine = through_both(
        f"eval {folder} --eval {write_rows(tmp_path / 'd.tsv', 48, 1)}"
    )
    assert nearly(engine) == nearly(reference)


@pytest.mark.parametrize(
    "family", ["bert", pytest.param("deberta-v2-rich", marks=pytest.mark.slow)]
)
def test_the_engine_is_told_which_text_of_a_pair_is_which(family: str, tmp_path: Path) -> None:
    """BERT adds an embedding for it; without it a good part of the answers changes."""
    folder = make_tiny_checkpoint(tmp_path, family=family, rungs="mux:2,merge:2", pairs=True)
    save_pair_tokenizer(folder)
    rng, pairs, joined = random.Random(0), "label\ttext_a\ttext_b\n", "label\ttext\n"
    for _ in range(48):
        label, size = rng.randrange(3), rng.randint(1, 9)
        a, b = (" ".join(f"w{rng.randrange(3, 300)}" for _ in range(size)) for _ in range(2))
        pairs += f"{label}\t{a}\t{b}\n"
        joined += f"{label}\t{a} [SEP] {b}\n"
    (tmp_path / "pairs.tsv").write_text(pairs)
    (tmp_path / "joined.tsv").write_text(joined)
    reference, engine = through_both(f"eval {folder} --eval {tmp_path / 'pairs.tsv'}")
    assert nearly(engine) == nearly(reference)
    single = f"eval {folder} --eval {tmp_path / 'joined.tsv'} --json"
    assert "single texts, but the adapters are trained on pairs of texts" in revmux(single).output
    values = json.loads((folder / "config.json").read_text())
    values["revmux"]["pairs"] = False
    (folder / "config.json").write_text(json.dumps(values))
    refused = revmux(f"eval {folder} --eval {tmp_path / 'pairs.tsv'}").output
    assert "pairs of texts, but the adapters are trained on single texts" in refused
    untold = json.loads(revmux(single).stdout)
    told = reference["rungs"]["merge:2"]["confusion"]
    assert untold["rungs"]["merge:2"]["confusion"] != told
