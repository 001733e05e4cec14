"""The report for a terminal, and as Markdown for ``docs/measurements.md``."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from gpu.results import FAIL
from gpu.settings import LATENCY, THROUGHPUT

Row = list[str]
ITEMS = ("stage", "item", "result", "")
THROUGHPUTS = (
    "shape, tokens",
    "",
    "requests/s",
    "ratio to plain vLLM (lowest to highest)",
    "layer limit",
    "share of it",
)
LATENCIES = (
    "shape, tokens",
    "offered/s",
    "requests, of them alone (%)",
    "p50: RevMUX, plain (ms)",
    "p95",
    "p99",
    "p50 ratio, by pairs",
    "p99 ratio, by pairs",
)
FRONT_END = (
    "Prompts are token ids, given to the engine in its own process: no HTTP, no tokenising and no "
    "API server are in these numbers."
)


def plan_table(planned: dict[str, float], minutes: float | None) -> Table:
    """What every stage may take, as guessed before anything was measured on a GPU."""
    limit = "" if minutes is None else f"; limited to {minutes:g} minutes"
    table = Table(title=f"Guessed time on one H100{limit}", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in planned.items():
        table.add_row(stage, f"{seconds:.0f}")
    table.add_row("together", f"{sum(planned.values()):.0f}")
    return table


def items_table(report: dict[str, Any]) -> Table:
    """Every item."""
    return _table("Items", ITEMS, item_rows(report), left=4)


def throughput_table(report: dict[str, Any]) -> Table:
    """Every rung of every shape and length."""
    return _table("Throughput", THROUGHPUTS, throughput_rows(report), left=2)


def latency_table(report: dict[str, Any]) -> Table:
    """Every shape at a quarter load."""
    return _table("Latency at a quarter load", LATENCIES, latency_rows(report), left=1)


def item_rows(report: dict[str, Any]) -> list[Row]:
    """Rows of ``ITEMS``."""
    return [[item["stage"], item["name"], item["status"], item["says"]] for item in report["items"]]


def throughput_rows(report: dict[str, Any]) -> list[Row]:
    """Rows of ``THROUGHPUTS``."""
    rows: list[Row] = []
    for found in _details(report, THROUGHPUT):
        where = f"{found['shape']}, {found['length']}"
        rows.append([where, "plain vLLM", f"{found['plain_requests_per_s']:,.1f}", "1", "", ""])
        for row in found["rows"]:
            rows.append(
                [
                    "",
                    row["rung"],
                    f"{row['requests_per_s']:,.1f}",
                    f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
                    f"{row['layer_limit']:.2f}",
                    f"{row['ratio_over_limit']:.2f}",
                ]
            )
    return rows


def latency_rows(report: dict[str, Any]) -> list[Row]:
    """Rows of ``LATENCIES``."""
    rows: list[Row] = []
    for found in _details(report, LATENCY):
        by_rung = found["requests_by_rung"]
        alone = 100 * by_rung.get("alone", 0) / max(1, sum(by_rung.values()))
        rows.append(
            [
                f"{found['shape']}, {found['length']}",
                f"{found['offered_per_s']:,.1f}",
                f"{found['requests']}, {alone:.0f}",
                *(
                    f"{found[f'ours_{name}_ms']:,.1f}, {found[f'plain_{name}_ms']:,.1f}"
                    for name in ("p50", "p95", "p99")
                ),
                *(
                    f"{found[f'{name}_ratio']:.2f} "
                    f"({', '.join(f'{ratio:.2f}' for ratio in found[f'{name}_ratios'])})"
                    for name in ("p50", "p99")
                ),
            ]
        )
    return rows


def markdown(report: dict[str, Any]) -> str:
    """A section for ``docs/measurements.md``: where and with what, and all tables."""
    device = report.get("device", "unknown device")
    versions = ", ".join(
        f"{name} {report[name]}" for name in ("vllm", "torch", "triton", "python") if name in report
    )
    runner = f", model runner {report['model_runner']}" if "model_runner" in report else ""
    lines = [
        f"## The GPU kit on {device}",
        "",
        f"{report['date'].split()[0]}, {device}; {versions}{runner}. `{report['command']}`",
        "",
    ]
    for title, columns, rows in (
        ("Items", ITEMS, item_rows(report)),
        ("Throughput", THROUGHPUTS, throughput_rows(report)),
        ("Latency at a quarter of plain vLLM's throughput", LATENCIES, latency_rows(report)),
    ):
        if rows:
            lines += [f"### {title}", "", *_as_markdown(columns, rows), ""]
    rounds = report["settings"]["rounds"]
    if throughput_rows(report):
        lines += [f"Median of {rounds} rounds after one to warm up, alternating. {FRONT_END}", ""]
    if failed := [item for item in report["items"] if item["status"] == FAIL]:
        lines += [f"{len(failed)} items failed.", ""]
    return "\n".join(lines)


def _details(report: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Of the items of a stage that measured something."""
    items = (item for item in report["items"] if item["stage"] == stage)
    return [item["details"] for item in items if "shape" in item["details"]]


def _as_markdown(columns: Sequence[str], rows: Iterable[Row]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


def _table(title: str, columns: Sequence[str], rows: Iterable[Row], left: int) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
