"""Write a checkpoint folder; what was there before stays until all of the new one is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.checkpoint.files import (
    ADAPTER_FILE,
    CONTRACT_FILE,
    KEY_PREFIX,
    REPORT_FILE,
    WORK_FOLDER,
)
from revmux_vllm.checkpoint.fingerprint import BACKBONE_FILES, fingerprint
from revmux_vllm.checkpoint.reading import backbone_shape, read_contracts
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError, within
from revmux_vllm.families import family_of
from revmux_vllm.planning.contract import Contract


def save(
    folder: str | Path,
    ladder: AdapterLadder,
    backbone: str | Path,
    card: str,
    *,
    report: dict[str, Any] | None = None,
    bundle_backbone: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> None:
    """Write a checkpoint folder; nothing is replaced before everything is written.

    Args:
        folder: created if missing.
        ladder: the adapters.
        backbone: folder or hub id of the frozen classifier.
        card: text of the model card.
        report: what was measured, as ``revmux eval --json`` prints it.
        bundle_backbone: copy the backbone's weights into the folder (``backbone`` must be a
            folder); otherwise the checkpoint names it.
        dtype: store the adapters in this dtype; default as they are.
        revision: commit of a ``backbone`` of the hub.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    check_output(folder, backbone, bundle_backbone)
    config = replace(ladder.config, **_named(backbone, bundle_backbone, revision))
    values = _config_values(config, backbone)
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(partial)
    if bundle_backbone:
        for source in weight_files(backbone):
            shutil.copyfile(source, partial / source.name)
    tensors = {
        KEY_PREFIX + key: tensor.detach().to(dtype or tensor.dtype).contiguous()
        for key, tensor in ladder.state_dict().items()
    }
    # Not save_file: it leaves files that only their owner can read.
    (partial / ADAPTER_FILE).write_bytes(serialize(tensors, metadata={"format": "pt"}))
    (partial / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        if not (partial / stale.name).exists():
            stale.unlink()
    for path in partial.iterdir():
        path.replace(folder / path.name)
    partial.rmdir()
    (folder / CONTRACT_FILE).unlink(missing_ok=True)  # of other adapters
    write_card(folder, card, report)


def _named(backbone: str | Path, bundle_backbone: bool, revision: str | None) -> dict[str, Any]:
    """How a checkpoint names its backbone, and which one it was."""
    if bundle_backbone:
        return {"backbone": None}
    if Path(backbone).is_dir():
        folder = Path(backbone).resolve()
        return {"backbone": str(folder), "fingerprint": fingerprint(folder)}
    return {"backbone": str(backbone), "backbone_revision": revision}


def _config_values(config: RevMuxConfig, backbone: str | Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``: the backbone's, our architecture and the ``revmux`` object.

    Raises:
        UserError: where the backbone cannot carry the rungs.
    """
    from transformers import AutoConfig

    values: dict[str, Any] = AutoConfig.from_pretrained(backbone).to_dict()
    with within(f"backbone {backbone}"):
        values["architectures"] = [family_of(values["model_type"]).architecture]
    config.check_backbone(*backbone_shape(values))
    values["is_encoder_decoder"] = False  # vLLM would look for a cross-attention cache
    values["revmux"] = config.to_dict()
    if config.label_words:
        names = [word.strip() for word in config.label_words]
        if config.score_template is not None:  # one output: how much more yes is it than no
            names = names[1:]
        values["id2label"] = dict(enumerate(names))
        values["label2id"] = {name: i for i, name in enumerate(names)}
    values.pop("_name_or_path", None)
    return values


def check_output(folder: Path, backbone: str | Path, bundle_backbone: bool) -> None:
    """Raise UserError unless a checkpoint over ``backbone`` may be written to ``folder``.

    Only to a new or empty folder, or over another checkpoint or an unfinished training.
    """
    if Path(backbone).is_dir() and Path(backbone).resolve() == folder.resolve():
        cure = "choose another"
        raise UserError(f"`output` {folder}", "that is the backbone's folder", cure=cure)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`output` {folder}", "expected a folder, found a file")
    own = (folder / name for name in ("partial", WORK_FOLDER, ADAPTER_FILE))
    if folder.exists() and any(folder.iterdir()) and not any(path.exists() for path in own):
        raise UserError(
            f"`output` {folder.resolve()}",
            "has other files than a checkpoint's",
            cure="choose a new folder",
        )
    if bundle_backbone:
        weight_files(backbone)


def weight_files(backbone: str | Path) -> list[Path]:
    """The safetensors files of a folder; UserError when there are none to bundle."""
    found = [path for pattern in BACKBONE_FILES for path in Path(backbone).glob(pattern)]
    if not found:
        raise UserError(
            "`bundle_backbone`",
            f"{backbone} is not a folder with model.safetensors",
            cure="leave the option out, or download the backbone as safetensors first",
        )
    return found


def write_card(folder: Path, card: str, report: dict[str, Any] | None) -> None:
    """The model card, and what was measured; an older report goes."""
    write_whole(folder / "README.md", card.encode())
    if report:
        write_whole(folder / REPORT_FILE, json.dumps(report, indent=1).encode() + b"\n")
    else:
        (folder / REPORT_FILE).unlink(missing_ok=True)


def write_contract(folder: Path, contract: Contract) -> None:
    """Add a contract, in place of one of the same terms."""
    others = [own for own in read_contracts(folder) if own.terms != contract.terms]
    kept = sorted([*others, contract], key=lambda own: str(own.terms))
    text = json.dumps({"contracts": [own.to_dict() for own in kept]}, indent=1) + "\n"
    write_whole(folder / CONTRACT_FILE, text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or on a full disk leave the one that was there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
