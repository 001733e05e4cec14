"""The model card of a checkpoint: what it is, and what was measured, if anything was."""

from typing import Any

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung
from revmux_vllm.training.evaluate import NUM_GROUPINGS, WINDOW

COLUMNS = ("", "accuracy", "agreement", "speed-up", "layer limit")


def model_card(name: str, config: RevMuxConfig, num_layers: int, report: dict[str, Any]) -> str:
    """Markdown. Accuracies stand in it only when ``report`` has them.

    Args:
        name: of the checkpoint.
        config: what it is.
        num_layers: layers L of the backbone.
        report: what was measured, as ``revmux eval --json`` prints it; may be empty.
    """
    lines = [
        f"# {name}",
        "",
        f"RevMUX adapters (`{config.adapter_type}`) over a frozen backbone of {num_layers} layers: "
        f"the first {config.prefill_layers} run on every sequence by itself, the others on "
        f"fewer rows ({', '.join(map(str, config.rungs))}) or on one sequence alone. `mux:N` packs "
        "N sequences into one composite, `merge:N` makes one row of N neighbouring tokens, `exit` "
        "answers after the first layers.",
        "",
        f"Serve it: `vllm serve {name}` with `revmux-vllm` installed.",
        "",
    ]
    if report:
        rows = [COLUMNS, ("---",) * len(COLUMNS), *report_rows(report)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [
            "",
            f"Per cent, mean (lowest to highest) over {NUM_GROUPINGS} shuffled groupings from "
            f"fixed seeds; {WINDOW} requests at a time are packed together as the server packs "
            "them. Agreement is with the backbone. Speed-up counts the arithmetic of layers, "
            f"adapters and heads at {report['mean_tokens']:.0f} tokens, the mean of these rows; "
            "the layer limit counts the layers alone. What does not multiplex has no spread: its "
            "answers do not depend on company. Early exit is the rival: a small head on the hidden "
            "states after some layer, trained and measured beside the adapters"
            + ("." if Rung(exit=True) in config.rungs else "; none is served."),
            "",
        ]
    return "\n".join(lines)


def report_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report of ``revmux eval`` as rows under ``COLUMNS``, per cent."""
    rows: list[tuple[str, ...]] = [
        ("backbone", _percent(report["backbone"]["accuracy"]), "100.0", "1.00x", "1.00x")
    ]
    for row in report.get("early_exit", []):
        rows.append(
            (
                f"early exit after layer {row['layer']}",
                _percent(row["accuracy"]),
                _percent(row["agreement"]),
                f"{row['speedup']:.2f}x",
                "",
            )
        )
    for rung, row in report["rungs"].items():
        rows.append(
            (
                rung,
                span(row["accuracy"]),
                span(row["agreement"]),
                f"{row['speedup']:.2f}x",
                f"{row['layer_limit']:.2f}x",
            )
        )
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def span(summary: dict[str, float]) -> str:
    """Mean (lowest to highest), per cent; the mean alone where all are the same."""
    mean, low, high = (_percent(summary[key]) for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"
