"""What ``revmux train`` and ``revmux eval`` print, and the model card repeats: a report as rows."""

from typing import Any

from rich.table import Table

COLUMNS = ("", "accuracy", "agreement", "speed-up", "layer limit")


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


def report_table(report: dict[str, Any]) -> Table:
    """The report as a table, per cent."""
    table = Table(title="Ten groupings: mean (lowest to highest), per cent")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in report_rows(report):
        table.add_row(*row)
    return table


def class_table(report: dict[str, Any]) -> Table:
    """Confusion matrix and scores of every class, of the backbone and of every rung."""
    names = report["classes"]
    table = Table(title="By class: scores in per cent, rows answered as each class")
    for column in ("", "class", "precision", "recall", "F1", *(f"as {name}" for name in names)):
        justify: Any = "left" if column in ("", "class") else "right"
        table.add_column(column, justify=justify, no_wrap=column == "")
    rungs = {"backbone": report["backbone"]} | report["rungs"]
    for rung, row in rungs.items():
        for i, name in enumerate(names):
            scores = (f"{100 * row['per_class'][s][i]:.1f}" for s in ("precision", "recall", "f1"))
            counts = (f"{count:.1f}" for count in row["confusion"][i])
            table.add_row(rung if i == 0 else "", name, *scores, *counts)
        table.add_section()
    return table


def span(summary: dict[str, float]) -> str:
    """Mean (lowest to highest), per cent; the mean alone where all are the same."""
    mean, low, high = (_percent(summary[key]) for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
