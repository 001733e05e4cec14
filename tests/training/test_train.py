"""``revmux train`` as a user runs it, on tiny backbones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, revmux, save_backbone, write_rows
from safetensors.torch import load, load_file

from revmux_vllm import bundled, checkpoint
from revmux_vllm.cli import DEFAULT_RUNGS, _rungs
from revmux_vllm.rungs import parse_rungs
from revmux_vllm.training import run, trainer
from revmux_vllm.training.exits import EXIT_FILE, exit_layers

WB = ("weight", "bias")
MERGED = ("merger", "refiner")
UP = {f"up.{i}.{p}" for i in (0, 2, 4) for p in WB}
MIXED = {"norm.weight", "down", "scale"} | {
    f"coupling.functions.{i}.{j}.{p}" for i in range(4) for j in (0, 2) for p in WB
}
MERGE_KEYS = {"merger.score.weight", "refiner.skip_norm.weight"} | {
    f"{part}.{p}" for part in (f"{m}.correction.{i}" for m in MERGED for i in (0, 2)) for p in WB
}
MERGE_KEYS |= {f"{part}.norm.weight" for part in MERGED}
EXIT_KEYS = {"layers.0.weight"} | {f"layers.{i}.{p}" for i in (2, 4, 6) for p in WB}
KEYS = {
    "revmux": MIXED | UP,
    "ora": MIXED | UP,
    "vanilla": {"norm.weight"}
    | UP
    | {f"maps.{i}.{p}" for i in range(4) for p in WB}
    | {f"mixer.{i}.{p}" for i in (0, 2) for p in WB},
}


def keys_of_width_4(folder: Path) -> set[str]:
    keys = load_file(folder / checkpoint.ADAPTER_FILE)
    return {k.removeprefix("revmux.mux:4.mux.") for k in keys if k.startswith("revmux.mux:4.mux.")}


def test_the_folder_is_a_checkpoint(trained: Path) -> None:
    rungs = ["exit", "mux:2", "mux:4", "merge:2"]
    assert list(map(str, checkpoint.validate(trained).rungs)) == rungs
    tensors = load_file(trained / checkpoint.ADAPTER_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert keys_of_width_4(trained) == KEYS["revmux"] | {"skip_norm.weight"}
    assert {k.removeprefix("revmux.merge:2.") for k in tensors if "merge:2." in k} == MERGE_KEYS
    card = (trained / "README.md").read_text()
    assert "early exit after layer 1" in card
    assert {k.removeprefix("revmux.exit.exit.") for k in tensors if "exit." in k} == EXIT_KEYS
    assert list(checkpoint.read_report(trained)["rungs"]) == rungs
    assert (trained / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (trained / "training-log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in log)
    assert not (trained / "trainer").exists()
    # vLLM reads every safetensors file at the top of a folder.
    assert (trained / EXIT_FILE).is_file()
    assert {p.name for p in trained.glob("*.safetensors")} == {
        "model.safetensors",
        "adapter.safetensors",
    }


def test_the_bundled_backbone_is_the_backbone_bit_for_bit(trained: Path) -> None:
    before = load_file(trained.parent / "backbone" / "model.safetensors")
    after = load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_adapters_and_exits_are_trained_and_the_backbone_is_bitwise_unchanged(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimised: list[str] = []
    layers: list[torch.nn.Module] = []
    create = trainer.Trainer.create_optimizer

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create(self, *args, **kwargs)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            optimised.extend(names[id(parameter)] for parameter in group["params"])
        layers.extend(self.model.backbone.layers)
        return optimizer

    monkeypatch.setattr(trainer.Trainer, "create_optimizer", watched)
    assert train("--learning-rate 0.1").exit_code == 0
    adapters = load_file(tmp_path / "out" / checkpoint.ADAPTER_FILE)
    exits = load_file(tmp_path / "out" / EXIT_FILE)
    expected = {key.replace(checkpoint.KEY_PREFIX, "ladder.", 1) for key in adapters}
    assert sorted(optimised) == sorted(expected | {f"exits.{key}" for key in exits})
    stored = load_file(tmp_path / "backbone" / "model.safetensors")
    assert len(layers) == 4
    for i, layer in enumerate(layers):
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, stored[f"model.layers.{i}.{key}"]), key


def test_every_adapter_parameter_has_moved(train: Train, tmp_path: Path) -> None:
    """A part that gets no gradient would stay at its initial value."""
    assert train("--learning-rate 1e-9").exit_code == 0
    start = checkpoint.load_adapters(tmp_path / "out").state_dict()
    assert train("--hold-out 0").exit_code == 0
    end = checkpoint.load_adapters(tmp_path / "out").state_dict()
    for key, tensor in end.items():
        assert (tensor - start[key]).abs().max() > 1e-5, key


@pytest.mark.parametrize("adapter_type", list(KEYS))
def test_the_papers_recipe_with_the_papers_adapters(
    adapter_type: str, train: Train, tmp_path: Path
) -> None:
    result = train(f"--recipe paper --adapter-type {adapter_type} --epochs 1")
    assert result.exit_code == 0, result.output
    assert keys_of_width_4(tmp_path / "out") == KEYS[adapter_type]
    config = checkpoint.validate(tmp_path / "out")
    assert (config.adapter_type, config.skip) == (adapter_type, False)


@pytest.mark.parametrize(
    ("family", "words"),
    [("bert", ""), ("mistral", ""), ("qwen3", "w8,w7"), ("t5", "w8,w7")],
)
def test_every_family_trains(family: str, words: str, train: Train, tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "dev.tsv", 32, 1)
    more = f"--eval {dev}" + (f" --label-words {words}" if words else "")
    result = train(more, family, language_model=bool(words))
    assert result.exit_code == 0, result.output
    config, values = checkpoint.read_config(tmp_path / "out")
    assert values["architectures"] == [checkpoint.ARCHITECTURES[family]]
    assert config.label_words == (tuple(words.split(",")) if words else None)


def test_a_cross_encoder_of_one_label_trains(train: Train, tmp_path: Path) -> None:
    save_backbone("bert", tmp_path / "backbone", num_labels=1)
    result = train(f"--eval {write_rows(tmp_path / 'dev.tsv', 32, 1)}")
    assert result.exit_code == 0, result.output
    report = checkpoint.read_report(tmp_path / "out")
    assert report["classes"] == ["no", "yes"]
    assert [sum(row) for row in report["rungs"]["mux:2"]["confusion"]] == pytest.approx([16, 16])


def test_mixed_precision_and_accumulated_batches(train: Train, tmp_path: Path) -> None:
    assert train("--bf16 --gradient-accumulation 3").exit_code == 0
    log = (tmp_path / "out" / "training-log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 144 // (3 * 16)


def test_unlabelled_rows_are_enough_and_are_not_taken_for_labelled_ones(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "train.tsv", 160, 0, labels=False)
    assert train().exit_code == 0
    assert "no column of labels" in caplog.text


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
    assert trainer.unfinished(tmp_path / "out" / "trainer"), "nothing to resume"
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--rungs mux:2,mux:5", "5 does not divide"),
        (
            "--rungs mux:two",
            "--rungs: rung 'mux:two': expected exit, mux:N, merge:N or merge:N+mux:N",
        ),
        ("--widths 2", "--rungs and --widths: give one of them"),
        ("--prefill-layers 4", "fewer than the backbone's 4 layers"),
        ("--batch-size 3", "expected at least the widest width 4"),
        ("--batch-size 500", "together at most the 144 training rows"),
        ("--backbone nowhere", "neither a folder with a config.json nor a model of the hub"),
        ("--train nowhere.tsv", "no such file"),
        ("--eval nowhere.tsv", "no such file"),
        ("--store-dtype int8", "expected auto, float32, bfloat16, float16"),
        ("--adapter-type best", "expected one of revmux, ora, vanilla"),
        ("--recipe secret", "expected default or paper"),
        ("--hold-out 1", "0 to below 1"),
        ("--rungs mux:32", "16 rows a process, fewer than the widest width 32"),
        ("--epochs 0 --gradient-accumulation 0", "--gradient-accumulation 0: expected at least 1"),
        ("--max-tokens 600", "the backbone takes 520 at most"),
        ("--text-columns a,b,c", "expected one, or two for pairs"),
        ("--bundle-backbone --backbone org/name", "not a folder with model.safetensors"),
        ("--adapter-hidden-size 0", "expected at least 1, found 0"),
        ("--label-words w3", "at least two different words"),
        ("--label-words w3,unheard", "the tokenizer does not know 'unheard'"),
        ("--backbone revmux-llama/config.json", "neither a folder with a config.json nor"),
        ("--learning-rate nan", "--learning-rate nan: expected more than 0"),
        ("--train sst2:train", "sst2:train: neither a file nor a hub data set"),
        ("--eval few.tsv", "3 rows, 64 at a time, never fill a composite of 4"),
        ("--label-words w3,w4", "not a trained LlamaForCausalLM: no weights for lm_head.weight"),
    ],
)
def test_mistakes_end_with_a_clear_error(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "few.tsv", 3, 1)
    result = train(change)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "--resume" not in result.output, "there is nothing to resume"
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    result = train(f"--output {tmp_path / 'mine'}")
    assert result.exit_code == 2
    assert "has other files than a checkpoint's" in " ".join(result.output.split())
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    backbone = train(f"--backbone {bundled.resolve('revmux-llama')}")
    assert "that is a RevMUX checkpoint" in " ".join(backbone.output.split())


def test_names_are_printed_as_they_are(train: Train, tmp_path: Path) -> None:
    """Rich reads [brackets] as markup and :train: as a picture."""
    save_backbone("llama", tmp_path / "backbone", num_labels=2)
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    config |= {"id2label": {"0": "[/b]", "1": ":train:"}, "label2id": {"[/b]": 0, ":train:": 1}}
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config))
    dev = write_rows(tmp_path / "dev.tsv", 32, 1)
    result = train(f"--output {tmp_path / 'out[v2]'} --eval {dev}")
    assert result.exit_code == 0, result.output
    assert f"vllm serve {tmp_path / 'out[v2]'}" in result.output
    shown = revmux(f"eval {tmp_path / 'out[v2]'} --eval {dev}")
    assert "[/b]" in shown.output
    assert ":train:" in shown.output


@pytest.mark.slow
def test_two_processes_share_a_training(train: Train, tmp_path: Path) -> None:
    """Two ranks, one set of adapters."""
    save_backbone("bert", tmp_path / "backbone", num_labels=2)
    rows = write_rows(tmp_path / "train.tsv", 160, 0)
    # What accelerate launch starts on a machine with two GPUs; on CPUs it would start one process.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "revmux_vllm.cli", "train", "--backbone", str(tmp_path / "backbone")]
    command += ["--train", str(rows), "--output", str(tmp_path / "out"), "--widths", "2,4"]
    command += ["--epochs", "1", "--batch-size", "16", "--augment", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    checkpoint.validate(tmp_path / "out")
    log = (tmp_path / "out" / "training-log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 144 // (2 * 16)  # each rank takes half of the rows


def test_widths_are_short_for_rungs() -> None:
    assert _rungs(None, "4,2") == parse_rungs(["mux:2", "mux:4"])
    assert _rungs(None, None) == parse_rungs(DEFAULT_RUNGS.split(","))
    with pytest.raises(ValueError, match="--widths two: rung 'mux:two': expected exit, mux:N"):
        _rungs(None, "two")


def test_exits_stand_at_the_cut_and_at_most_five_elsewhere() -> None:
    assert exit_layers(3, 6) == [1, 2, 3, 4, 5]
    assert 7 in exit_layers(7, 32)
    assert len(exit_layers(7, 32)) <= 6
