"""What was measured, as a table and as a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from router_simulation.routers import ROUTERS

STYLES = dict(zip(ROUTERS, ("o-", "s--", "^:"), strict=True))


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What people read, in 80 columns."""
    table = Table(
        "engines", "router", "fronts", "s", "answers\nper s", "p50\nms", "p99\nms", "width",
        "busy", "alone", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.columns[1].no_wrap, table.columns[1].min_width = True, max(map(len, ROUTERS))
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before["replicas"] != row["replicas"]:
            table.add_section()
        table.add_row(
            f"{row['replicas']:,}",
            row["router"],
            str(row["fronts"]),
            f"{row['simulated_s']:g}",
            f"{row['throughput_per_s']:,.1f}",
            f"{row['p50_ms']:,.0f}",
            f"{row['p99_ms']:,.0f}",
            f"{row['width']:.2f}",
            f"{row['busy']:.0%}",
            f"{row['rungs'].get('alone', 0):.0%}",
        )
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report: four panels over the number of replicas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "mean width": lambda row: row["width"],
        "p99 latency, ms": lambda row: row["p99_ms"],
        "requests/s per replica": lambda row: row["throughput_per_s"] / row["replicas"],
        "time that replicas compute, %": lambda row: 100 * row["busy"],
    }
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for axes, (name, value) in zip(grid.flat, panels.items(), strict=True):
        for router, style in STYLES.items():
            rows = [row for row in report["points"] if row["router"] == router]
            if rows:
                numbers = [row["replicas"] for row in rows]
                axes.plot(numbers, [value(row) for row in rows], style, label=router)
        axes.set_ylabel(name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("replicas")
    grid[0][0].legend(fontsize=8)
    given = report["setting"]
    figure.suptitle(f"Simulated, {given['load']:.0%} load, filled to {given['fill_s']:g} s")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
