"""The model card of a checkpoint: what it is, and what was measured, if anything was."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, metadata_load

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.problems import Problem
from revmux_vllm.rungs import Rung, in_words
from revmux_vllm.training.evaluate import NUM_GROUPINGS, WINDOW
from revmux_vllm.training.tables import COLUMNS, NEAR_COLUMNS, near_rows, report_rows

TASK = "text-classification"
LICENSE_KEYS = ("license", "license_name", "license_link")


def front_matter(backbone: str) -> ModelCardData:
    """What hubs read of a checkpoint over ``backbone``, a folder or hub id."""
    is_folder = Path(backbone).is_dir()
    return ModelCardData(
        base_model=Path(backbone).resolve().name if is_folder else backbone,
        library_name="revmux-vllm",
        pipeline_tag=TASK,
        tags=["vllm", "revmux", TASK],
        **_license_of(backbone),
    )


def _license_of(backbone: str) -> dict[str, Any]:
    """As the backbone's own card has it; empty where it has none, or none that can be read."""
    path = Path(backbone) / "README.md"
    try:
        if not path.parent.is_dir():
            path = Path(hf_hub_download(backbone, path.name))
        known = metadata_load(path) or {}
    except Exception:  # the hub and YAML have many, and none is worth a training that has ended
        return {}
    return {key: known[key] for key in LICENSE_KEYS if key in known}


def model_card(
    name: str,
    front: ModelCardData,
    config: RevMuxConfig,
    num_layers: int,
    report: dict[str, Any],
) -> str:
    """Markdown. Accuracies stand in it only when ``report`` has them.

    Args:
        name: of the checkpoint.
        front: what stands before the text.
        config: what it is.
        num_layers: layers L of the backbone.
        report: what was measured, as ``revmux eval --json`` prints it; may be empty.
    """
    cut = f" Trained on texts cut at {config.max_tokens} tokens." if config.max_tokens else ""
    lines = [
        f"# {name}",
        "",
        f"RevMUX adapters (`{config.adapter_type}`) over a frozen backbone of {num_layers} layers: "
        f"the first {config.prefill_layers} run on every sequence by itself, the others on "
        f"fewer rows ({', '.join(map(str, config.rungs))}) or on one sequence alone. What a rung "
        f"runs them on: {in_words()}." + cut,
        "",
        f"Serve it: `vllm serve {name}` with `revmux-vllm` installed.",
        "",
    ]
    if report:
        for columns, rows in ((COLUMNS, report_rows(report)), (NEAR_COLUMNS, near_rows(report))):
            head = [tuple(c.replace("|", "\\|") for c in columns), ("---",) * len(columns)]
            lines += [*("| " + " | ".join(row) + " |" for row in [*head, *rows]), ""]
        lines += [_how_it_was_measured(config, report), ""]
    text = "\n".join(lines)
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{text}"))


def _how_it_was_measured(config: RevMuxConfig, report: dict[str, Any]) -> str:
    means = {
        Problem.LABELS: "A row counts where all of its labels are right. ",
        Problem.VALUES: "Accuracy and agreement are correlations (Pearson) with the labels and "
        "the backbone's values. ",
    }.get(Problem(report.get("problem", Problem.ONE_CLASS)), "")
    served = "." if Rung(exit=True) in config.rungs else "; none is served."
    return (
        f"Per cent, mean (lowest to highest) over {NUM_GROUPINGS} shuffled groupings from "
        f"fixed seeds; {WINDOW} requests at a time are packed together as the server packs "
        f"them. Agreement is with the backbone. {means}Speed-up counts the arithmetic of layers, "
        f"adapters and heads at {report['mean_tokens']:.0f} tokens, the mean of these rows; "
        "the layer limit counts the layers alone. What does not multiplex has no spread: its "
        "answers do not depend on company. Early exit is the alternative: a small head on the "
        f"hidden states after some layer, trained and measured beside the adapters{served} In a "
        "cascade of them each request leaves at the first exit that is sure enough, by a threshold "
        "that keeps the named agreement on rows held out from training. Than either: points of "
        "agreement more than it has at the same speed-up, read between its points. |p-p'| is the "
        "distance of a probability from the backbone's, on average and its 99th percentile; side "
        "of 0.9 is the share of probabilities that a threshold there sorts alike; AUC is against "
        "the labels."
    )
