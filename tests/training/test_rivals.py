"""What rungs are measured against, and how near answers are to the backbone's."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Train, make_tiny_checkpoint, revmux, write_rows
from sklearn.metrics import roc_auc_score

from revmux_vllm import checkpoint
from revmux_vllm.problems import Problem
from revmux_vllm.training import cascade
from revmux_vllm.training.evaluate import agreement_at
from revmux_vllm.training.scores import auc, compare, nearness


def two(*second: float) -> torch.Tensor:
    """Probabilities of two classes, by the second one's."""
    own = torch.tensor(second)
    return torch.stack([1 - own, own], dim=-1)


def test_probabilities_are_compared_and_not_labels_alone() -> None:
    own, near = two(0.95, 0.2, 0.6, 0.999), two(0.85, 0.2, 0.4, 0.999)
    row = nearness(near[None], own, torch.tensor([1, 0, 1, 1]), Problem.ONE_CLASS)
    assert row["distance_mean"] == pytest.approx((0.1 + 0.2) / 4)
    assert row["distance_p99"] == pytest.approx(0.197)
    # Of eight probabilities: 0.6 and its complement change sides of 0.5; 0.95 that of 0.9.
    assert row["same_side"] == pytest.approx({"0.5": 6 / 8, "0.9": 7 / 8, "0.99": 1.0})
    assert row["auc"] == 1.0
    scores = compare([near, own], own, torch.tensor([1, 0, 1, 1]), Problem.ONE_CLASS)
    assert scores["agreement"] == {"mean": 0.875, "min": 0.75, "max": 1.0}
    assert scores["confusion"] == [[1.0, 0.0], [0.5, 2.5]]


def test_area_under_the_curve_is_the_mean_of_one_against_the_others() -> None:
    probabilities, labels = torch.rand(50, 3).softmax(-1), torch.arange(50) % 2  # none of the third
    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(2)]
    hits = labels[:, None] == torch.arange(3)
    assert auc(probabilities, hits) == pytest.approx(sum(areas) / 2)
    assert math.isnan(auc(probabilities, hits & False))


def test_a_row_leaves_at_the_first_exit_that_is_sure() -> None:
    exits = torch.stack([two(0.6, 0.99, 0.5), two(0.1, 0.7, 0.55)], dim=1)  # (3 rows, 2 exits, 2)
    own = two(0.3, 0.3, 0.3)
    walked = cascade.walk(exits, own, 0.8)
    assert walked.place.tolist() == [1, 0, 2]
    torch.testing.assert_close(walked.answers[:, 1], torch.tensor([0.1, 0.99, 0.3]))
    assert cascade.speedup(walked.place, [0.25, 0.5, 1.25]) == pytest.approx(3 / 2)


def test_thresholds_keep_their_agreement_and_ask_no_more_than_needed() -> None:
    torch.manual_seed(0)
    own = torch.randn(2000, 2).softmax(-1)
    noisy = [(own.log() + noise * torch.randn(2000, 2)).softmax(-1) for noise in (1.0, 0.3)]
    exits = torch.stack(noisy, dim=1)
    thresholds = cascade.calibrate(exits, own)
    assert list(thresholds) == list(cascade.TARGETS)
    kept = []
    for target, threshold in thresholds.items():
        agreed = cascade.walk(exits, own, threshold).answers.argmax(-1) == own.argmax(-1)
        kept.append(agreed.float().mean().item())
        assert kept[-1] >= target
        lower = cascade.walk(exits, own, threshold - 2 / cascade.STEPS).answers.argmax(-1)
        assert (lower == own.argmax(-1)).float().mean() < target + 0.01
    assert kept == sorted(kept, reverse=True)
    never = cascade.calibrate(1 - exits, own)[0.99]  # always wrong, however sure
    assert (cascade.walk(1 - exits, own, never).place == 2).float().mean() > 0.9


def test_the_rival_is_read_between_its_points_and_not_beyond_them() -> None:
    line = [{"speedup": 2.0, "agreement": 0.9}, {"speedup": 4.0, "agreement": 0.8}]
    assert agreement_at(line, 3.0) == pytest.approx(0.85)
    assert agreement_at(line, 1.5) == pytest.approx(0.95)
    assert agreement_at(line, 4.5) is None
    assert agreement_at([], 1.5) is None


def test_a_measurement_is_kept_and_servers_go_by_it(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, rungs="mux:2,merge:2@2")
    before = json.loads(revmux(f"inspect {folder} --json").stdout)
    assert before["rungs_in_use"] == []
    assert "never measured" in before["served_at"]
    rows = tmp_path / "rows.tsv"
    rows.write_text("label\ttext\n" + "".join(f"{i % 3}\tw{i} w7\n" for i in range(40)))
    result = revmux(f"eval {folder} --eval {rows} --save --json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert checkpoint.read_report(folder) == report
    measured = checkpoint.read_measured(folder)
    assert {str(rung) for rung in measured} == {"mux:2", "merge:2@2"}
    assert (folder / "accuracy.png").is_file()
    assert "merge:2@2" in (folder / "README.md").read_text()
    after = json.loads(revmux(f"inspect {folder} --json").stdout)
    assert {*after["rungs_in_use"], *after["rungs_left_out"]} == {"mux:2", "merge:2@2"}
    assert "Left out" in revmux(f"inspect {folder}").output or after["rungs_left_out"] == {}


def test_a_report_of_another_version_names_the_cure(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, rungs="mux:2")
    old = {"rungs": {"mux:2": {"speedup": 1.5, "agreement": {"mean": 0.9}}}}
    (folder / checkpoint.REPORT_FILE).write_text(json.dumps(old))
    result = revmux(f"inspect {folder}")
    assert result.exit_code == 2
    assert "measure it again with" in " ".join(result.output.split())


def test_rungs_with_stops_are_trained_together(train: Train, tmp_path: Path) -> None:
    rungs = "exit,exit@2,exit@3,mux:2,mux:2@3,merge:2@2,merge:2@3"
    rows = write_rows(tmp_path / "dev.tsv", 48, 3)
    result = train(f"--rungs {rungs} --hold-out 0.2 --eval {rows}")
    assert result.exit_code == 0, result.output
    report = checkpoint.read_report(tmp_path / "out")
    assert sorted(report["rungs"]) == sorted(rungs.split(","))
    speedups = {name: row["speedup"] for name, row in report["rungs"].items()}
    assert speedups["exit"] > speedups["exit@2"] > speedups["exit@3"] > 1
    assert speedups["mux:2@3"] > speedups["mux:2"]
    assert [row["target"] for row in report["cascade"]] == list(cascade.TARGETS)
