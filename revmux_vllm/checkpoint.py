"""Read and write a checkpoint folder.

    config.json           the backbone's config, our architecture, and the ``revmux`` object
    adapter.safetensors   the adapters' weights alone, every key under ``revmux.``
    report.json           what was measured, if anything was (``revmux eval --json``)
    model.safetensors     the backbone, unless ``revmux.backbone`` names where it is
    tokenizer files, README.md (the model card)

The keys carry a prefix because vLLM reads every safetensors file of a folder into one stream.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.config import RevMuxConfig

ADAPTER_FILE = "adapter.safetensors"
KEY_PREFIX = "revmux."
REPORT_FILE = "report.json"
WORK_FOLDER = "trainer"  # of a training that has not ended, in the folder that it will write
ARCHITECTURES = {
    "bert": "RevMuxBertForSequenceClassification",
    "roberta": "RevMuxRobertaForSequenceClassification",
    "llama": "RevMuxLlamaForSequenceClassification",
    "mistral": "RevMuxMistralForSequenceClassification",
    "qwen2": "RevMuxQwen2ForSequenceClassification",
    "qwen3": "RevMuxQwen3ForSequenceClassification",
    "t5": "RevMuxT5ForSequenceClassification",
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BACKBONE_FILES = ("model*.safetensors", "model.safetensors.index.json")


def read_config(folder: str | Path) -> tuple[RevMuxConfig, dict[str, Any]]:
    """The ``revmux`` object and the whole ``config.json``, checked against each other.

    Raises:
        ValueError: naming the key, what was expected and what was found.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a checkpoint folder: config.json is missing")
    values = _read_json(path)
    if "revmux" not in values:
        raise ValueError(f"{path}: revmux: missing; is this a plain backbone? `revmux train` it")
    architecture = ARCHITECTURES.get(values.get("model_type", ""))
    if values.get("architectures") != [architecture]:
        raise ValueError(
            f"{path}: architectures: expected {[architecture]} for model_type "
            f"{values.get('model_type')!r}, found {values.get('architectures')}"
        )
    try:
        config = RevMuxConfig.from_dict(values["revmux"])
        config.check_backbone(*backbone_shape(values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return values


def backbone_shape(values: dict[str, Any]) -> tuple[int, int]:
    """Hidden size and layers of a ``config.json``; T5 has names of its own for them."""
    if "d_model" in values:
        return int(values["d_model"]), int(values["num_layers"])
    return int(values["hidden_size"]), int(values["num_hidden_layers"])


def meta_ladder(config: RevMuxConfig, values: dict[str, Any]) -> AdapterLadder:
    """Adapters of the shapes that a ``config.json`` asks for, without memory behind them."""
    with torch.device("meta"):
        return AdapterLadder(config, backbone_shape(values)[0])


def read_report(folder: str | Path) -> dict[str, Any]:
    """What was measured when the checkpoint was made; empty if nothing was."""
    path = Path(folder) / REPORT_FILE
    return _read_json(path) if path.is_file() else {}


def validate(folder: str | Path) -> RevMuxConfig:
    """Check a folder without reading its weights: keys, shapes and dtypes of every tensor.

    Raises:
        ValueError: listing everything that is wrong.
    """
    folder = Path(folder)
    config, values = read_config(folder)
    _check_named_backbone(folder, values)
    expected = meta_ladder(config, values).state_dict()
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: {ADAPTER_FILE} is missing")
    problems = []
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            dtypes = {key: tensor.get_dtype() for key, tensor in found.items()}
            shapes = {key: list(tensor.get_shape()) for key, tensor in found.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
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
        raise ValueError(f"{path}:\n" + "\n".join(problems))
    return config


def _check_named_backbone(folder: Path, values: dict[str, Any]) -> None:
    """A backbone of another shape would fail late, or load in silence: Mistral's names are LLaMA's.

    One on the hub is not asked for.
    """
    named = Path(backbone_folder(folder)) / "config.json"
    if named.parent == folder:
        return
    if not named.is_file():
        if not named.is_absolute():
            return  # of the hub
        raise ValueError(
            f"{folder / 'config.json'}: revmux.backbone: {named.parent} is not there any more; put "
            "it back, or write there where it is now (--bundle-backbone would have copied it)"
        )
    found = _read_json(named)
    differing = [
        f"{key}: {found[key]!r} in the backbone, {values[key]!r} here"
        for key in ("model_type", "hidden_size", "num_hidden_layers", "d_model", "num_layers")
        if key in found and key in values and found[key] != values[key]
    ]
    if differing:
        raise ValueError(
            f"{folder / 'config.json'}: revmux.backbone: {named.parent} is not the backbone that "
            f"the adapters were trained on: {'; '.join(differing)}; name that one"
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
    """Where the backbone's weights are: a folder, or a hub id."""
    config, _ = read_config(folder)
    if config.backbone is None:
        return str(folder)
    beside = Path(folder) / config.backbone
    return str(beside) if beside.is_dir() else config.backbone


def plain_backbone(folder: Path, target: Path) -> str:
    """The backbone of a checkpoint as vLLM's own class loads it: without adapters beside it.

    vLLM reads every safetensors file of a folder and refuses weights that its class does not know,
    so ``target`` becomes a folder of links to all the others.
    """
    named = backbone_folder(folder)
    if named != str(folder):
        return named
    for path in folder.iterdir():
        if path.name not in (ADAPTER_FILE, "config.json"):
            (target / path.name).symlink_to(path.resolve())
    _, values = read_config(folder)
    del values["revmux"]
    values["architectures"] = [name.removeprefix("RevMux") for name in values["architectures"]]
    (target / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(target)


def save(
    folder: str | Path,
    ladder: AdapterLadder,
    backbone: str | Path,
    card: str,
    *,
    report: dict[str, Any] | None = None,
    bundle_backbone: bool = False,
    dtype: torch.dtype | None = None,
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
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(folder)
    check_output(folder, backbone, bundle_backbone)
    values = AutoConfig.from_pretrained(backbone).to_dict()
    architecture = ARCHITECTURES.get(values["model_type"])
    if architecture is None:
        raise ValueError(
            f"backbone {backbone}: model_type {values['model_type']!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(partial)
    named: str | None = str(backbone)
    if Path(backbone).is_dir():
        named = str(Path(backbone).resolve())
    if bundle_backbone:
        named = None
        for source in weight_files(backbone):
            shutil.copyfile(source, partial / source.name)
    config = replace(ladder.config, backbone=named)
    config.check_backbone(*backbone_shape(values))
    values["architectures"] = [architecture]
    values["is_encoder_decoder"] = False  # vLLM would look for a cross-attention cache
    values["revmux"] = config.to_dict()
    if config.label_words:
        names = [word.strip() for word in config.label_words]
        values["id2label"] = dict(enumerate(names))
        values["label2id"] = {name: i for i, name in enumerate(names)}
    values.pop("_name_or_path", None)
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
    write_card(folder, card, report)


def check_output(folder: Path, backbone: str | Path, bundle_backbone: bool) -> None:
    """Raise ValueError unless a checkpoint over ``backbone`` may be written to ``folder``.

    Only to a new or empty folder, or over another checkpoint or an unfinished training.
    """
    if Path(backbone).is_dir() and Path(backbone).resolve() == folder.resolve():
        raise ValueError(f"--output {folder}: that is the backbone's folder; choose another")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: expected a folder, found a file")
    own = (folder / name for name in ("partial", WORK_FOLDER, ADAPTER_FILE))
    if folder.exists() and any(folder.iterdir()) and not any(path.exists() for path in own):
        raise ValueError(
            f"--output {folder.resolve()}: has other files than a checkpoint's; choose a new folder"
        )
    if bundle_backbone:
        weight_files(backbone)


def weight_files(backbone: str | Path) -> list[Path]:
    """The safetensors files of a folder; ValueError when there are none to bundle."""
    found = [path for pattern in BACKBONE_FILES for path in Path(backbone).glob(pattern)]
    if not found:
        raise ValueError(
            f"--bundle-backbone: {backbone} is not a folder with model.safetensors; leave the "
            "option out, or download the backbone as safetensors first"
        )
    return found


def write_card(folder: Path, card: str, report: dict[str, Any] | None) -> None:
    """The model card, and what was measured; an older report goes."""
    write_whole(folder / "README.md", card.encode())
    if report:
        write_whole(folder / REPORT_FILE, json.dumps(report, indent=1).encode() + b"\n")
    else:
        (folder / REPORT_FILE).unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or on a full disk leave the one that was there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
