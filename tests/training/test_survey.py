"""What early exits on a sample say about cut and rungs, and a training that goes by it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, write_rows
from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm import checkpoint
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.training import run, survey, trainer, work
from revmux_vllm.training.cascade import CASCADE_FILE
from revmux_vllm.training.survey import propose

# Early exits of a 30-layer LLaMA on SST-2: what it knows appears within a few layers.
DEEP = [0.7] * 7 + [0.80, 0.81, 0.84, 0.82, 0.84, 0.87, 0.90, 0.955, 0.96, 0.965, 0.968, 0.97, 0.97]
DEEP += [0.975, 0.981, 0.98, 0.985, 0.99, 0.99, 0.99, 0.99, 0.99]
AUTO = "--rungs auto --prefill-layers auto"


def test_a_deep_model_is_cut_before_it_knows_and_read_after() -> None:
    cut, rungs = propose(DEEP)
    assert cut == 12
    expected = "mux:2 merge:2 merge:4 exit@15 exit@22 merge:2@17 merge:4@17"
    assert set(map(str, rungs)) == set(expected.split())


def test_a_task_that_the_first_layer_knows_is_answered_there() -> None:
    cut, rungs = propose([0.99] * 11)
    assert cut == 1
    assert "exit" in map(str, rungs)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_what_is_proposed_can_be_served(agreements: list[float]) -> None:
    cut, rungs = propose(agreements)
    RevMuxConfig(rungs, cut).check_backbone(64, len(agreements) + 1)


def test_a_training_goes_by_the_survey_and_resumes_without_another(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.JsonLines, "on_train_end", interrupt, raising=False)
        early = train(f"{AUTO} --hold-out 0.3")  # in the survey's own training
    assert early.exit_code == 2, early.output
    surveyed: list[survey.Proposal] = []

    def watched(*args: Any) -> survey.Proposal:
        surveyed.append(survey.survey(*args))
        return surveyed[-1]

    monkeypatch.setattr(run, "survey", watched)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write", interrupt)
        stopped = train(f"{AUTO} --hold-out 0.3 --resume")
    assert stopped.exit_code == 2, stopped.output
    ((cut, rungs),) = surveyed
    names = ",".join(map(str, rungs))
    told = " ".join(stopped.output.split())
    assert f"--prefill-layers {cut} --rungs" in told
    assert "after layer" in told
    assert not list(work.folder_in(tmp_path / "out").glob("survey*"))
    resumed = train(f"{AUTO} --hold-out 0.3 --resume")
    assert resumed.exit_code == 0, resumed.output
    assert len(surveyed) == 1
    config = checkpoint.validate(tmp_path / "out")
    assert (config.prefill_layers, ",".join(map(str, config.rungs))) == (cut, names)
    options = json.loads((tmp_path / "out" / work.OPTIONS_FILE).read_text())
    assert (options["prefill_layers"], options["rungs"]) == (cut, names.split(","))


@pytest.mark.parametrize("given", ["--rungs auto --widths 2", "--prefill-layers auto"])
def test_what_is_given_is_kept(given: str, train: Train, tmp_path: Path) -> None:
    assert train(f"{given} --hold-out 0").exit_code == 0
    config = checkpoint.validate(tmp_path / "out")
    if "--widths" in given:
        assert (config.prefill_layers, list(map(str, config.rungs))) == (1, ["mux:2"])
    else:
        assert "merge:2+mux:2" in map(str, config.rungs)


def test_the_papers_recipe_has_its_own_cut(train: Train, tmp_path: Path) -> None:
    assert train(f"{AUTO} --recipe paper --epochs 1").exit_code == 0
    config = checkpoint.validate(tmp_path / "out")
    assert (config.prefill_layers, list(map(str, config.rungs))) == (2, ["mux:2", "mux:4"])


def test_rows_of_their_own_choose(train: Train, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.tsv", 40, 3)
    result = train(f"--validation {own} --hold-out 0")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / CASCADE_FILE).read_text())
    log = (tmp_path / "out" / work.LOG_FILE).read_text()
    assert "eval_loss" in log
    few = write_rows(tmp_path / "few.tsv", 3, 3)
    assert "3 rows a process" in " ".join(train(f"--validation {few}").output.split())
