"""What a checkpoint folder is, without loading its backbone: ``revmux inspect``."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from revmux_vllm.config import RevMuxConfig, layer_limit
from revmux_vllm.planning.options import read_options
from revmux_vllm.terminal import AsJson, Folder, make_console, mendable_errors


def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """What a checkpoint is: backbone, rungs, parameters added, layer limits, accuracies."""
    with mendable_errors():
        facts = describe(folder)
    if as_json:
        print(json.dumps(facts))
    else:
        _print_facts(facts, str(folder), make_console())


def describe(folder: str | Path) -> dict[str, Any]:
    """The facts that ``revmux inspect`` prints.

    Raises:
        UserError: when it is not a checkpoint, or a broken one.
    """
    from revmux_vllm import bundled, checkpoint

    folder = bundled.resolve(folder)
    config = checkpoint.validate(folder)
    _, values = checkpoint.read_config(folder)
    hidden_size, layers = checkpoint.backbone_shape(values)
    named = checkpoint.named_backbone(folder)
    if config.backbone_revision:
        named += f" at {config.backbone_revision}"
    backbone = _count_parameters(folder, config)
    report = checkpoint.read_report(folder)
    rungs = {}
    for rung, adapter in checkpoint.meta_ladder(config, values).items():
        count = sum(parameter.numel() for parameter in adapter.parameters())
        measured = report.get("rungs", {}).get(str(rung), {})
        rungs[str(rung)] = {
            "layer_limit": layer_limit(rung, config.prefill_layers, layers),
            "parameters": count,
            "parameters_share": count / backbone,
            "speedup": measured.get("speedup"),
            "accuracy": measured.get("accuracy"),
            "agreement": measured.get("agreement"),
        }
    measured = checkpoint.read_measured(folder)
    choice = read_options({}, config, measured).choice
    contracts = checkpoint.read_contracts(folder)
    return {
        "architecture": values["architectures"][0],
        "adapter_type": config.adapter_type,
        "backbone": "in this folder" if config.backbone is None else named,
        "backbone_fingerprint": (config.fingerprint or {}).get("weights"),
        "backbone_parameters": backbone,
        "backbone_accuracy": report.get("backbone", {}).get("accuracy"),
        "hidden_size": hidden_size,
        "layers": layers,
        "prefill_layers": config.prefill_layers,
        "max_tokens": config.max_tokens,
        "label_words": list(config.label_words) if config.label_words else None,
        "rungs_in_use": [str(rung) for rung in choice.used],
        "rungs_left_out": {str(rung): why for rung, why in choice.left_out.items()},
        "served_at": str(choice),
        "contracts": [contract.to_dict() for contract in contracts],
        "calibrated_for": "; ".join(
            f"{contract} at {contract.speedup:.2f}x" for contract in contracts
        )
        or None,
        "rungs": rungs,
        "early_exit": report.get("early_exit", []),
    }


def _count_parameters(folder: Path, config: RevMuxConfig) -> int:
    """Of the backbone, by its config alone: its weights may be on the hub."""
    import torch
    from transformers import AutoConfig

    from revmux_vllm.backbones.loading import model_class

    hf_config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class(hf_config, config.label_words).from_config(hf_config)
    return sum(parameter.numel() for parameter in model.parameters())


def _print_facts(facts: dict[str, Any], title: str, console: Console) -> None:
    table = Table(title=title, show_header=False)
    for key, value in facts.items():
        if not isinstance(value, dict | list) or key == "label_words":
            table.add_row(key.replace("_", " "), _plain(value))
    console.print(table)
    rungs = Table()
    for column in ("rung", "limit", "added", "of backbone", "speed-up", "accuracy"):
        rungs.add_column(column, no_wrap=True)
    for rung, row in facts["rungs"].items():
        accuracy = row["accuracy"]
        rungs.add_row(
            rung,
            f"{row['layer_limit']:.2f}x",
            f"{row['parameters']:,}",
            f"{100 * row['parameters_share']:.1f} %",
            f"{row['speedup']:.2f}x" if accuracy else "",
            f"{100 * accuracy['mean']:.1f} %" if accuracy else "not measured",
        )
    console.print(rungs)
    if facts["early_exit"]:
        exits = Table("early exit after layer", "speed-up", "accuracy")
        for row in facts["early_exit"]:
            shares = f"{row['speedup']:.2f}x", f"{100 * row['accuracy']:.1f} %"
            exits.add_row(str(row["layer"]), *shares)
        console.print(exits)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else str(value)
