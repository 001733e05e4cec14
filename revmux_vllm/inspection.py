"""What a checkpoint folder is, without loading its backbone."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from revmux_vllm import bundled, checkpoint
from revmux_vllm.config import layer_limit


def describe(folder: str | Path) -> dict[str, Any]:
    """The facts that ``revmux inspect`` prints.

    Raises:
        ValueError: when it is not a checkpoint, or a broken one.
    """
    folder = bundled.resolve(folder)
    config = checkpoint.validate(folder)
    _, values = checkpoint.read_config(folder)
    hidden_size, layers = checkpoint.backbone_shape(values)
    named = checkpoint.backbone_folder(folder)
    backbone = _count_parameters(Path(named))
    report = checkpoint.read_report(folder)
    rungs = {}
    for rung, adapter in checkpoint.meta_ladder(config, values).items():
        count = sum(parameter.numel() for parameter in adapter.parameters())
        measured = report.get("rungs", {}).get(str(rung), {})
        rungs[str(rung)] = {
            "layer_limit": layer_limit(rung.saving, config.prefill_layers, layers),
            "parameters": count,
            "parameters_share": count / backbone if backbone else None,
            "accuracy": measured.get("accuracy"),
            "agreement": measured.get("agreement"),
        }
    return {
        "architecture": values["architectures"][0],
        "adapter_type": config.adapter_type,
        "backbone": "in this folder" if config.backbone is None else named,
        "backbone_parameters": backbone,
        "backbone_accuracy": report.get("backbone", {}).get("accuracy"),
        "hidden_size": hidden_size,
        "layers": layers,
        "prefill_layers": config.prefill_layers,
        "label_words": list(config.label_words) if config.label_words else None,
        "rungs": rungs,
    }


def _count_parameters(folder: Path) -> int | None:
    """Numbers in a folder's safetensors files, its adapters left out; None if it is not here."""
    files = [path for path in folder.glob("*.safetensors") if path.name != checkpoint.ADAPTER_FILE]
    total = 0
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                total += int(torch.Size(file.get_slice(key).get_shape()).numel())
    return total if files else None
