"""What ``revmux train`` and ``revmux eval`` print, and the model card repeats: a report as rows."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from revmux_vllm.planning.contract import Contract

COLUMNS = ("", "accuracy", "agreement", "speed-up", "layer limit")
NEAR_COLUMNS = ("", "than exit", "than cascade", "|p-p'|", "p99", "side of 0.9", "AUC")
"""Points of agreement more than early exit, and than a cascade of early exits, has at the same
speed-up; then how near the probabilities are to the backbone's."""


def report_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report of ``revmux eval`` as rows under ``COLUMNS``, per cent."""
    accuracy = _percent(report["backbone"]["accuracy"])
    rows: list[tuple[str, ...]] = [("backbone", accuracy, "100.0", "1.00x", "1.00x")]
    for name, row in _rivals(report):
        accuracy, agreement = _percent(row["accuracy"]), _percent(row["agreement"])
        rows.append((name, accuracy, agreement, f"{row['speedup']:.2f}x", ""))
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


def near_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The same report as rows under ``NEAR_COLUMNS``."""
    auc = report["backbone"]["probabilities"]["auc"]
    rows: list[tuple[str, ...]] = [("backbone", *[""] * 5, _three(auc))]
    rows += [(name, "", "", *_probabilities(row)) for name, row in _rivals(report)]
    for rung, row in report["rungs"].items():
        ahead = (_points(row[f"ahead_of_{line}"]) for line in ("early_exit", "cascade"))
        rows.append((rung, *ahead, *_probabilities(row)))
    return rows


def _rivals(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the rungs are measured against, and the contracts."""
    for row in report.get("early_exit", []):
        yield f"early exit after {row['layer']}", row
    for row in report.get("cascade", []):
        yield f"cascade for {row['target']:.0%}", row
    for row in report.get("contracts", []):
        yield f"contract {row['name']}", row


def _probabilities(row: dict[str, Any]) -> tuple[str, ...]:
    near = row["probabilities"]
    return (
        f"{near['distance_mean']:.3f}",
        f"{near['distance_p99']:.2f}",
        "" if near["same_side"]["0.9"] is None else _percent(near["same_side"]["0.9"]),
        _three(near["auc"]),
    )


def _three(number: float | None) -> str:
    """Digits of it; empty where there is none, as of values."""
    return "" if number is None else f"{number:.3f}"


def _points(difference: float | None) -> str:
    """Per cent with a sign; empty where the rival has no such speed-up."""
    return "" if difference is None else f"{100 * difference:+.1f}"


def report_tables(report: dict[str, Any]) -> list[Table]:
    """The report as two tables, per cent."""
    return [
        _table("Ten groupings: mean (lowest to highest), per cent", COLUMNS, report_rows(report)),
        _table(
            "Points of agreement more than the rival at that speed-up, and probabilities",
            NEAR_COLUMNS,
            near_rows(report),
        ),
    ]


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=column == "")
    for row in rows:
        table.add_row(*row)
    return table


def class_table(report: dict[str, Any]) -> Table | None:
    """Confusion matrix and scores of every class, of the backbone and of every rung.

    Of several labels each has its agreement with the backbone in place of the matrix. None of
    values.
    """
    if "per_class" not in report["backbone"]:
        return None
    names, has_matrix = report["classes"], "confusion" in report["backbone"]
    more = [f"as {name}" for name in names] if has_matrix else ["agreement"]
    title = "rows answered as each class" if has_matrix else "every label by itself"
    table = Table(title=f"By class: scores in per cent, {title}")
    for column in ("", "class", "precision", "recall", "F1", *more):
        justify: Any = "left" if column in ("", "class") else "right"
        table.add_column(column, justify=justify, no_wrap=column == "")
    rungs = {"backbone": report["backbone"]} | report["rungs"]
    for rung, row in rungs.items():
        for i, name in enumerate(names):
            scores = (f"{100 * row['per_class'][s][i]:.1f}" for s in ("precision", "recall", "f1"))
            if has_matrix:
                last = [f"{count:.1f}" for count in row["confusion"][i]]
            else:
                last = [f"{100 * row['per_class']['agreement'][i]:.1f}"]
            table.add_row(rung if i == 0 else "", name, *scores, *last)
        table.add_section()
    return table


def contract_table(contract: Contract) -> Table:
    """Where requests leave under a contract, with its promise as the title."""
    table = Table(
        title=f"{contract}: {contract.measured:.2%} on {contract.rows} rows that tested it, at "
        f"{contract.speedup:.2f}x in arithmetic"
    )
    for column in ("stop", "least trust (log odds)", "leave there"):
        table.add_column(column, justify="left" if column == "stop" else "right")
    places = zip(contract.stops, contract.thresholds, contract.shares, strict=True)
    for stop, threshold, share in places:
        least = "nobody leaves" if threshold is None else f"{threshold:.2f}"
        table.add_row(str(stop), least, f"{share:.1%}")
    table.add_row("alone", "", f"{1 - sum(contract.shares):.1%}")
    return table


def span(summary: dict[str, float]) -> str:
    """Mean (lowest to highest), per cent; the mean alone where all are the same."""
    mean, low, high = (_percent(summary[key]) for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
