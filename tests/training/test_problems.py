"""Several labels at once, and values: trained, measured, and served as vLLM itself serves them."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import revmux, save_backbone, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from revmux_vllm import checkpoint
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.problems import Problem
from revmux_vllm.rungs import Rung
from revmux_vllm.training import data
from revmux_vllm.training.labels import UNLABELLED, is_blank
from revmux_vllm.training.losses import value_loss
from revmux_vllm.training.scores import compare

NAMES = ["toxic", "insult", "threat"]


def backbone_of(folder: Path, problem: Problem, family: str, outputs: int) -> Path:
    save_backbone(family, folder, num_labels=outputs)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"problem_type": str(problem)}
    if problem is Problem.LABELS:
        values["id2label"] = dict(enumerate(NAMES))
        values["label2id"] = {name: i for i, name in enumerate(NAMES)}
    path.write_text(json.dumps(values))
    return folder


def rows_of(path: Path, count: int, problem: Problem, seed: int) -> Path:
    """Texts with labels that are words in them, or a value."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        words = [f"w{rng.randrange(10, 300)}" for _ in range(rng.randint(2, 12))]
        label: Any = [NAMES[i] for i in range(3) if f"w{i}" in words]
        if problem is Problem.VALUES:
            label = rng.random()
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("problem", "family", "outputs"),
    [(Problem.LABELS, "llama", 3), (Problem.VALUES, "bert", 1)],
)
def test_it_trains_is_measured_and_is_served(
    problem: Problem, family: str, outputs: int, tmp_path: Path
) -> None:
    backbone = backbone_of(tmp_path / "backbone", problem, family, outputs)
    rows = rows_of(tmp_path / "train.jsonl", 160, problem, 0)
    dev = rows_of(tmp_path / "dev.jsonl", 32, problem, 1)
    out = tmp_path / "out"
    result = revmux(
        f"train --backbone {backbone} --train {rows} --eval {dev} --output {out} --epochs 2 "
        "--prefill-layers 1 --rungs mux:2,merge:2,exit --batch-size 16 --adapter-hidden-size 24"
    )
    assert result.exit_code == 0, result.output
    report = checkpoint.read_report(out)
    assert report["problem"] == str(problem)
    assert -1 <= report["rungs"]["merge:2"]["agreement"]["mean"] <= 1
    assert bool(report["cascade"]) == (problem is Problem.LABELS)
    told = "where all of its labels are right" if outputs == 3 else "correlations (Pearson)"
    assert told in (out / "README.md").read_text()

    measured = revmux(f"eval {out} --eval {dev}")
    assert measured.exit_code == 0, measured.output
    assert ("threat" in measured.stdout) == (problem is Problem.LABELS)
    if problem is Problem.LABELS:
        by_vllm = json.loads(revmux(f"eval {out} --eval {dev} --json --engine").stdout)
        for rung, row in report["rungs"].items():
            near = by_vllm["rungs"][rung]["probabilities"]["distance_mean"]
            assert near == pytest.approx(row["probabilities"]["distance_mean"], abs=1e-4)

    refused = revmux(f"calibrate {out} --data {dev} --agreement 0.5")
    assert refused.exit_code == 2
    assert f"this is {problem}" in " ".join(refused.output.split())

    model = AutoModelForSequenceClassification.from_pretrained(backbone).eval()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    texts = ["w7 w8 w9", "w20 w21"]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in texts])
    engine = InProcessEngine(out, enforce_eager=True, dtype="float32", max_model_len=64)
    try:
        engine.run_at(Rung())
        answers = torch.tensor([list(one.outputs.probs) for one in engine.classify(texts)])
    finally:
        engine.close()
    expected = logits.sigmoid() if problem is Problem.LABELS else logits
    torch.testing.assert_close(answers, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['["toxic", "threat"]', "[]"], [[1, 0, 1], [0, 0, 0]]),
        (['["Insult"]', '"TOXIC"'], [[0, 1, 0], [1, 0, 0]]),
        (["[0, 2]", "[2]"], [[1, 0, 1], [0, 0, 1]]),
        (["[0.0, 1.0, 1.0]", "[1, 0, 0]"], [[0, 1, 1], [1, 0, 0]]),
        (["[true, false, false]", '"toxic, insult"'], [[1, 0, 0], [1, 1, 0]]),
        (["null", "-1"], [[UNLABELLED] * 3] * 2),
        (["[1, 1, 0]", '" "'], [[1, 1, 0], [0, 0, 0]]),
    ],
)
def test_several_labels_as_people_write_them(
    lines: list[str], expected: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(f'{{"text": "a", "label": {label}}}' for label in lines))
    assert data.read_rows(path, NAMES, problem=Problem.LABELS).labels == expected


def test_labels_in_columns_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,text,Toxic,threat,insult\n7,a,1,0,1\n8,b,0,1,0\n")
    rows = data.read_rows(path, NAMES, problem=Problem.LABELS, need_labels=True)
    assert rows.labels == [[1, 1, 0], [0, 0, 1]]


def test_two_labels_and_one(tmp_path: Path) -> None:
    def read(names: list[str], *labels: str) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(f'{{"text": "a", "label": {label}}}' for label in labels))
        return data.read_rows(path, names, problem=Problem.LABELS).labels

    assert read(["a", "b"], "[1.0, 0.0]", "[true, true]", '["b"]') == [[1, 0], [1, 1], [0, 1]]
    with pytest.raises(ValueError, match=r"label \[0, 1\]: two indices, or a zero and a one\?"):
        read(["a", "b"], "[0, 1]")
    assert read(["toxic"], "1", "0", "true", '"toxic"', "[]") == [[1], [0], [1], [1], [0]]


def test_minus_one_is_a_value(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,-1\nb,\nc,0.5\n")
    rows = data.read_rows(path, ["score"], problem=Problem.VALUES)
    assert [is_blank(label) for label in rows.labels] == [False, True, False]
    assert rows.labels[0] == [-1.0]


def test_lists_of_class_labels_are_matched_by_name(tmp_path: Path) -> None:
    one = datasets.ClassLabel(names=["threat", "toxic", "insult"])
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.List(one)})
    rows = {"text": ["a", "b"], "labels": [[0, 1], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    read = data.read_rows(tmp_path / "rows.parquet", NAMES, problem=Problem.LABELS)
    assert read.labels == [[1, 0, 1], [0, 0, 0]]
    two = ["toxic", "threat"]
    one = datasets.ClassLabel(names=["threat", "toxic"])
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.List(one)})
    datasets.Dataset.from_dict({"text": ["a"], "labels": [[0, 1]]}, features=features).to_parquet(
        tmp_path / "two.parquet"
    )
    read = data.read_rows(tmp_path / "two.parquet", two, problem=Problem.LABELS)
    assert read.labels == [[1, 1]], "indices, whatever they look like"


@pytest.mark.parametrize(
    ("problem", "label", "message"),
    [
        (Problem.LABELS, '["rude"]', "row 1: label 'rude': expected an integer from 0 to 2"),
        (Problem.LABELS, "{}", "row 1: label {}: expected a list of labels, or a zero or one"),
        (Problem.VALUES, '"high"', "row 1: label 'high': expected 3 numbers"),
        (Problem.VALUES, "[1, 2]", r"row 1: label \[1, 2\]: expected 3 numbers"),
    ],
)
def test_mistakes_are_named(problem: Problem, label: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a", "label": {label}}}')
    with pytest.raises(ValueError, match=message):
        data.read_rows(path, NAMES, problem=problem)


def test_scores_of_several_labels() -> None:
    own = torch.tensor([[0.9, 0.2], [0.4, 0.6], [0.1, 0.3]])
    given = torch.tensor([[0.8, 0.2], [0.6, 0.6], [0.1, 0.3]])
    labels = torch.tensor([[1, 0], [1, 1], [0, 0]])
    both = (torch.stack([1 - p, p], dim=-1) for p in (given, own))
    answers, backbones = both
    scores = compare([answers], backbones, labels, Problem.LABELS)
    assert scores["accuracy"]["mean"] == 1.0
    assert scores["agreement"]["mean"] == pytest.approx(2 / 3)
    assert scores["per_class"]["agreement"] == pytest.approx([2 / 3, 1.0])
    assert scores["per_class"]["recall"] == [1.0, 1.0]
    assert scores["probabilities"]["same_side"]["0.5"] == pytest.approx(5 / 6)
    alone = compare([backbones], backbones, labels, Problem.LABELS)
    assert alone["per_class"]["recall"] == pytest.approx([0.5, 1.0])


def test_scores_and_loss_of_values() -> None:
    own = torch.tensor([[1.0], [2.0], [4.0]])
    scores = compare([2 * own + 1, -own], own, own, Problem.VALUES)
    assert scores["agreement"] == pytest.approx({"mean": 0.0, "min": -1.0, "max": 1.0})
    assert scores["probabilities"]["auc"] is None
    unlabelled = torch.full_like(own, torch.nan)
    assert value_loss(own, unlabelled, own) == 0
    assert value_loss(own, own + 2, own) == pytest.approx(1 / own.var(unbiased=False))


def test_unlabelled_rows_are_enough(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path / "backbone", Problem.LABELS, "llama", 3)
    rows = write_rows(tmp_path / "train.tsv", 64, 0, labels=False)
    result = revmux(
        f"train --backbone {backbone} --train {rows} --output {tmp_path / 'out'} --epochs 1 "
        "--prefill-layers 1 --rungs merge:2 --batch-size 16 --adapter-hidden-size 24"
    )
    assert result.exit_code == 0, result.output
