"""``revmux train`` that was stopped, and goes on; and what a full disk does to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, write_rows
from safetensors.torch import load, load_file

from revmux_vllm import checkpoint
from revmux_vllm.training import run, trainer, work


@pytest.mark.parametrize(
    ("stop", "message"),
    [(KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left on device"), "No space")],
)
def test_a_stopped_training_resumes(
    stop: BaseException, message: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second epoch and continued: the same steps and weights as in one go."""

    def evaluated() -> list[int]:
        log = (tmp_path / "out" / "training-log.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in log if "eval_loss" in line]

    whole = train("--epochs 2 --hold-out 0.3")
    assert whole.exit_code == 0, whole.output
    expected = evaluated()
    finished = (tmp_path / "out" / checkpoint.ADAPTER_FILE).read_bytes()

    def interrupt(self: Any, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        if state.global_step == 11:
            (Path(args.output_dir) / "checkpoint-11").mkdir(
                exist_ok=True
            )  # as a full disk leaves it
            raise stop

    with monkeypatch.context() as patch:
        patch.setattr(trainer.JsonLines, "on_step_end", interrupt, raising=False)
        stopped = train("--epochs 2 --hold-out 0.3")
    assert stopped.exit_code == 2
    assert message in stopped.output
    assert "--resume continues it" in " ".join(stopped.output.split())
    # What was there before still serves.
    assert (tmp_path / "out" / checkpoint.ADAPTER_FILE).read_bytes() == finished
    checkpoint.validate(tmp_path / "out")
    assert "continue it with --resume" in train("--epochs 2 --hold-out 0.3").output
    other = train("--epochs 2 --hold-out 0.3 --learning-rate 0.1 --resume")
    assert "begun with other options: learning_rate was 0.001" in " ".join(other.output.split())
    resumed = train("--epochs 2 --hold-out 0.3 --resume")
    assert resumed.exit_code == 0, resumed.output
    assert evaluated() == expected
    before, after = load(finished), load_file(tmp_path / "out" / checkpoint.ADAPTER_FILE)
    for key, tensor in after.items():
        torch.testing.assert_close(tensor, before[key], atol=1e-6, rtol=1e-5)
    nothing = train("--epochs 2 --hold-out 0.3 --resume")
    assert "no unfinished training" in nothing.output


@pytest.mark.parametrize("more", ["", "--hold-out 0 --batch-size 32"])
def test_what_stops_while_measuring_resumes(
    more: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where so little was trained that nothing was logged."""
    options = f"--eval {write_rows(tmp_path / 'dev.tsv', 32, 1)} {more}"

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", full)
        stopped = train(options)
    assert stopped.exit_code == 2
    assert "--resume continues it" in " ".join(stopped.output.split())
    checkpoint.validate(tmp_path / "out")
    resumed = train(f"{options} --resume")
    assert resumed.exit_code == 0, resumed.output
    assert checkpoint.read_report(tmp_path / "out")["rungs"]


def test_a_training_stopped_before_its_first_report_resumes(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.JsonLines, "on_step_end", interrupt, raising=False)
        assert "--resume" in train("--hold-out 0").output
    assert work.unfinished(tmp_path / "out" / "trainer"), "nothing to resume"
    resumed = train("--hold-out 0 --resume")
    assert resumed.exit_code == 0, resumed.output


def test_a_full_disk_is_told_from_other_errors(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch and safetensors report it as an error of their own."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(trainer.Trainer, "_save_checkpoint", broken)
    assert isinstance(train().exception, RuntimeError)
    monkeypatch.setattr(trainer, "FULL_DISK", 1 << 62)
    shutil.rmtree(tmp_path / "out")
    stopped = train()
    assert stopped.exit_code == 2
    assert "No space left on device" in stopped.output
