"""What a checkpoint folder is, without loading its backbone."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from revmux_vllm import bundled, checkpoint
from revmux_vllm.backbones import model_class
from revmux_vllm.config import RevMuxConfig, layer_limit


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
    backbone = _count_parameters(folder, config)
    report = checkpoint.read_report(folder)
    rungs = {}
    for rung, adapter in checkpoint.meta_ladder(config, values).items():
        count = sum(parameter.numel() for parameter in adapter.parameters())
        measured = report.get("rungs", {}).get(str(rung), {})
        rungs[str(rung)] = {
            "layer_limit": layer_limit(rung.saving, config.prefill_layers, layers),
            "parameters": count,
            "parameters_share": count / backbone,
            "speedup": measured.get("speedup"),
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
        "early_exit": report.get("early_exit", []),
    }


def _count_parameters(folder: Path, config: RevMuxConfig) -> int:
    """Of the backbone, by its config alone: its weights may be on the hub."""
    hf_config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class(hf_config, config.label_words).from_config(hf_config)
    return sum(parameter.numel() for parameter in model.parameters())
