"""The model card of a checkpoint: what it is, and what was measured, if anything was."""

from typing import Any

from revmux_vllm.config import RevMuxConfig, layer_limit

COLUMNS = ("", "accuracy", "agreement with the backbone", "layer limit")


def model_card(name: str, config: RevMuxConfig, num_layers: int, report: dict[str, Any]) -> str:
    """Markdown. Accuracies stand in it only when ``report`` has them."""
    lines = [
        f"# {name}",
        "",
        f"RevMUX adapters (`{config.adapter_type}`) over a frozen backbone of {num_layers} layers: "
        f"the first {config.prefill_layers} run on every sequence by itself, the others on "
        f"composites of {', '.join(map(str, config.widths))} sequences or on one alone.",
        "",
        f"Serve it: `vllm serve {name}` with `revmux-vllm` installed.",
        "",
    ]
    if report:
        rows = [COLUMNS, ("---",) * len(COLUMNS), *report_rows(report, num_layers)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [
            "",
            "Per cent, mean (lowest to highest) over ten shuffled groupings from fixed seeds; "
            "64 requests at a time are packed together as the server packs them. Early exit is "
            "the rival, measured beside it, and not part of this folder.",
            "",
        ]
    return "\n".join(lines)


def report_rows(report: dict[str, Any], num_layers: int) -> list[tuple[str, ...]]:
    """The report of ``revmux eval`` as rows under ``COLUMNS``, per cent."""
    rows: list[tuple[str, ...]] = [
        ("backbone", _percent(report["backbone"]["accuracy"]), "100.0", "1.00x")
    ]
    if early := report.get("early_exit"):
        rows.append(
            (
                f"early exit after layer {early['prefill_layers']}",
                _percent(early["accuracy"]),
                _percent(early["agreement"]),
                f"{num_layers / early['prefill_layers']:.2f}x",
            )
        )
    for width, row in report["widths"].items():
        limit = layer_limit(int(width), row["prefill_layers"], num_layers)
        rows.append(
            (f"width {width}", _span(row["accuracy"]), _span(row["agreement"]), f"{limit:.2f}x")
        )
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _span(summary: dict[str, float]) -> str:
    mean, low, high = (_percent(summary[key]) for key in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})"
