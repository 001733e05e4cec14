"""What training may take of a machine's memory, and where it puts the rest."""

from pathlib import Path

import psutil
import pytest
import torch
from conftest import Train, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from revmux_vllm import checkpoint
from revmux_vllm.training import device
from revmux_vllm.training.features import _buffer


def container(folder: Path, most: str, used: int = 0, files: int = 0) -> Path:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nslab 7\n")
    return folder


@pytest.mark.parametrize(
    ("most", "used", "files", "expected"),
    [("5000000", 3000000, 500000, 2500000), ("1000", 2000, 0, 0)],
)
def test_a_container_may_have_less_than_the_machine(
    most: str,
    used: int,
    files: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "CGROUP", container(tmp_path, most, used, files))
    assert device.free_memory() == expected


def test_without_a_limit_it_is_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cgroup in (tmp_path / "nothing", container(tmp_path, "max")):
        monkeypatch.setattr(device, "CGROUP", cgroup)
        assert device.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_what_a_container_has_no_room_for_is_kept_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CGROUP", container(tmp_path, "5000000"))
    _buffer(1_000, 64, tmp_path / "small")
    _buffer(50_000, 64, tmp_path / "large")
    assert not (tmp_path / "small").exists()
    assert [path.stat().st_size for path in (tmp_path / "large").iterdir()] == [50_000 * 64 * 4]


def test_a_backbone_that_fits_only_as_it_is_stored_trains_so(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train("--train nowhere.tsv")  # makes the backbone
    folder = tmp_path / "backbone"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    dev = write_rows(tmp_path / "dev.tsv", 32, 1)
    assert train(f"--eval {dev}").exit_code == 0
    assert "as it is stored" not in caplog.text
    whole = checkpoint.read_report(tmp_path / "out")
    size = (folder / "model.safetensors").stat().st_size
    limit = container(tmp_path, str(int(2.5 * size)))  # in float32 it takes 2 times its size
    monkeypatch.setattr(device, "CGROUP", limit)
    assert train(f"--eval {dev} --output {tmp_path / 'narrow'}").exit_code == 0
    assert "computed in bfloat16, as it is stored" in caplog.text
    assert load_file(tmp_path / "narrow" / "adapter.safetensors")
    narrow = checkpoint.read_report(tmp_path / "narrow")
    assert narrow["backbone"]["accuracy"] == pytest.approx(whole["backbone"]["accuracy"], abs=0.1)
