"""Read a checkpoint folder, and check it without reading its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from revmux_vllm import hub
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.checkpoint.files import (
    ADAPTER_FILE,
    CONTRACT_FILE,
    KEY_PREFIX,
    REPORT_FILE,
    read_json,
)
from revmux_vllm.checkpoint.fingerprint import differences, fingerprint
from revmux_vllm.config import RevMuxConfig, as_key
from revmux_vllm.errors import UserError, within
from revmux_vllm.families import family_of
from revmux_vllm.planning.contract import Contract
from revmux_vllm.planning.worth import Measured
from revmux_vllm.rungs import Rung

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_config(folder: str | Path) -> tuple[RevMuxConfig, dict[str, Any]]:
    """The ``revmux`` object and the whole ``config.json``, checked against each other.

    Raises:
        UserError: naming the key, what was expected and what was found.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}", "not a checkpoint folder: config.json is missing")
    values = read_json(path)
    if "revmux" not in values:
        cure = "is this a plain backbone? `revmux train` it"
        raise UserError(f"{path}", "revmux: missing", cure=cure)
    with within(f"{path}", as_key):
        wanted = [family_of(values.get("model_type", "")).architecture]
        if (found := values.get("architectures")) != wanted:
            kind = f"{wanted} for model_type {values['model_type']!r}"
            raise UserError("architectures", f"expected {kind}, found {found}")
        config = RevMuxConfig.from_dict(values["revmux"])
        config.check_backbone(*backbone_shape(values))
    return config, values


def backbone_shape(values: dict[str, Any]) -> tuple[int, int]:
    """Hidden size and layers of a ``config.json``."""
    hidden_size, num_layers = family_of(values["model_type"]).size_keys
    return int(values[hidden_size]), int(values[num_layers])


def meta_ladder(config: RevMuxConfig, values: dict[str, Any]) -> AdapterLadder:
    """Adapters of the shapes that a ``config.json`` asks for, without memory behind them."""
    with torch.device("meta"):
        return AdapterLadder(config, backbone_shape(values)[0])


def read_report(folder: str | Path) -> dict[str, Any]:
    """What was measured when the checkpoint was made; empty if nothing was."""
    path = Path(folder) / REPORT_FILE
    return read_json(path) if path.is_file() else {}


def read_measured(folder: str | Path) -> dict[Rung, Measured]:
    """What was measured of every rung of a checkpoint; empty if nothing was.

    Raises:
        UserError: for a report that another version wrote.
    """
    path = Path(folder) / REPORT_FILE
    found = {}
    for name, row in read_report(folder).get("rungs", {}).items():
        try:
            found[Rung.parse(name)] = Measured(
                speedup=row["speedup"],
                agreement=row["agreement"]["mean"],
                distance=row["probabilities"]["distance_mean"],
            )
        except (KeyError, TypeError) as error:
            cure = "measure it again with `revmux eval FOLDER --eval ROWS --save`"
            raise UserError(f"{path}", f"{name} has no {error}", cure=cure) from error
    return found


def read_contracts(folder: str | Path) -> list[Contract]:
    """What the checkpoint is calibrated for; see ``revmux calibrate``.

    Raises:
        UserError: for a file that another version wrote.
    """
    path = Path(folder) / CONTRACT_FILE
    if not path.is_file():
        return []
    with within(f"{path}"):
        return [Contract.from_dict(values) for values in read_json(path)["contracts"]]


def validate(folder: str | Path) -> RevMuxConfig:
    """Check a folder without reading its weights: keys, shapes and dtypes of every tensor.

    Raises:
        UserError: listing everything that is wrong.
    """
    folder = Path(folder)
    config, values = read_config(folder)
    _check_named_backbone(folder, values)
    expected = meta_ladder(config, values).state_dict()
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise UserError(f"{folder}", f"{ADAPTER_FILE} is missing")
    problems = []
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            dtypes = {key: tensor.get_dtype() for key, tensor in found.items()}
            shapes = {key: list(tensor.get_shape()) for key, tensor in found.items()}
    except SafetensorError as error:
        raise UserError(f"{path}", f"not a safetensors file: {error}") from error
    for key, tensor in expected.items():
        name = KEY_PREFIX + key
        if name not in found:
            problems.append(f"{name}: missing")
            continue
        if shapes[name] != list(tensor.shape):
            problems.append(f"{name}: expected shape {list(tensor.shape)}, found {shapes[name]}")
        if dtypes[name] not in DTYPES:
            problems.append(f"{name}: expected one of {sorted(DTYPES)}, found {dtypes[name]}")
    names = {KEY_PREFIX + key for key in expected}
    problems += [f"{key}: unknown key" for key in sorted(set(found) - names)]
    if len(set(dtypes.values())) > 1:
        problems.append(f"expected one dtype for all weights, found {sorted(set(dtypes.values()))}")
    if problems:
        raise UserError(f"{path}:\n" + "\n".join(problems))
    return config


def _check_named_backbone(folder: Path, values: dict[str, Any]) -> None:
    """Another backbone would fail late, or answer in silence with what its adapters do not know.

    One on the hub is not asked for: it is read at the commit that the adapters were trained on.
    """
    named = Path(named_backbone(folder)) / "config.json"
    if named.parent == folder:
        return
    if not named.is_file():
        if not named.is_absolute():
            return  # of the hub
        raise UserError(
            f"{folder / 'config.json'}: revmux.backbone",
            f"{named.parent} is not there any more",
            cure="put it back, or write there where it is now (`bundle_backbone` would have copied "
            "it)",
        )
    from transformers import AutoConfig

    # As the checkpoint's was read: a Mistral with ``layer_types`` becomes a Ministral.
    found = AutoConfig.from_pretrained(named.parent).to_dict()
    differing = [
        f"{key}: {found[key]!r} in the backbone, {values[key]!r} here"
        for key in ("model_type", *family_of(values["model_type"]).size_keys)
        if key in found and key in values and found[key] != values[key]
    ]
    config = RevMuxConfig.from_dict(values["revmux"])
    if not differing and config.fingerprint is not None:
        own = fingerprint(named.parent)
        if config.label_words:
            own["labels"] = None
        differing = differences(own, dict(config.fingerprint))
    if differing:
        raise UserError(
            f"{folder / 'config.json'}: revmux.backbone",
            f"{named.parent} is not the backbone that the adapters were trained on: "
            + "; ".join(differing),
            cure="name that one, or train adapters for this one",
        )


def adapter_dtype(folder: str | Path) -> torch.dtype:
    """In which the adapters of a valid folder are stored."""
    with safe_open(Path(folder) / ADAPTER_FILE, "pt") as file:
        return DTYPES[file.get_slice(next(iter(file.keys()))).get_dtype()]


def load_adapters(folder: str | Path, dtype: torch.dtype | None = None) -> AdapterLadder:
    """The adapters of a folder, in ``dtype`` or as stored."""
    config = validate(folder)
    _, values = read_config(folder)
    tensors = load_file(Path(folder) / ADAPTER_FILE)
    ladder = meta_ladder(config, values)
    state = {
        key.removeprefix(KEY_PREFIX): tensor.to(dtype) if dtype else tensor
        for key, tensor in tensors.items()
    }
    ladder.load_state_dict(state, assign=True)
    return ladder.eval()


def backbone_folder(folder: str | Path) -> str:
    """Where the backbone's weights are; from the hub they are fetched first.

    Raises:
        UserError: where they cannot be had.
    """
    named, config = named_backbone(folder), read_config(folder)[0]
    if Path(named).is_dir() or Path(named).is_absolute():
        return named
    return str(hub.snapshot(named, config.backbone_revision))


def named_backbone(folder: str | Path) -> str:
    """What a checkpoint calls its backbone: a folder, which is its own where it has a copy, or a
    hub id."""
    config, _ = read_config(folder)
    if config.backbone is None:
        return str(folder)
    beside = Path(folder) / config.backbone
    return str(beside) if beside.is_dir() else config.backbone


def plain_backbone(folder: Path, target: Path) -> str:
    """The backbone of a checkpoint as vLLM's own class loads it: without adapters beside it, and
    under the name that vLLM has for it.

    vLLM reads every safetensors file of a folder and refuses weights that its class does not know,
    so ``target`` becomes a folder of links to all the others.
    """
    named = Path(backbone_folder(folder))
    values = read_json(named / "config.json")
    family = family_of(values["model_type"])
    if named != folder and not family.vllm_name:
        return str(named)
    for path in named.iterdir():
        if path.name not in (ADAPTER_FILE, "config.json"):
            (target / path.name).symlink_to(path.resolve())
    values.pop("revmux", None)
    values["architectures"] = [family.plain_architecture]
    (target / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(target)
