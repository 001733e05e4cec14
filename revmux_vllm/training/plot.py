"""Against speed-up: accuracy, and the distance of the probabilities from the backbone's.

The lines of early exit stand beside those of the rungs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PLOT_FILE = "accuracy.png"
"""In a checkpoint folder."""


class Point(NamedTuple):
    """What is drawn of one row of a report, per cent or probability, with its spread."""

    value: float
    low: float
    high: float


Measure = Callable[[dict[str, Any]], Point]


class Line(NamedTuple):
    """Rows of one way of saving by name, which stands beside the point unless it is empty."""

    name: str
    style: str
    colour: str | None
    rows: Sequence[tuple[str, dict[str, Any]]]


def plot_report(report: dict[str, Any], path: Path, title: str) -> None:
    """Draw the report of ``revmux eval`` as a PNG; a bar is the spread over the groupings."""
    cuts = sorted({row["prefill_layers"] for row in report["rungs"].values()})
    plot_frontier({f"l={', '.join(map(str, cuts))}": report}, path, title)


def best_exits(reports: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The most accurate early exit of each layer, whatever recipe trained it."""
    best: dict[int, dict[str, Any]] = {}
    for report in reports:
        for row in report.get("early_exit", []):
            best[row["layer"]] = max(best.get(row["layer"], row), row, key=lambda r: r["accuracy"])
    return best


def plot_frontier(
    reports: dict[str, dict[str, Any]], path: Path, title: str, lines: Iterable[str] | None = None
) -> None:
    """Draw several reports over one backbone, beside the best early exit of each layer.

    Args:
        reports: by the name of their line; the early exits of all of them are drawn as one.
        lines: which of them to draw. Default: all.
        path: PNG to write.
        title: above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    backbone = 100 * next(iter(reports.values()))["backbone"]["accuracy"]
    left.axhline(backbone, color="grey", linewidth=0.8, linestyle=":", label="backbone")
    for line in _lines(reports, lines):
        _draw(left, line, _accuracy, Point(backbone, backbone, backbone))
        _draw(right, line, _distance, None)
    left.set_ylabel("accuracy, per cent (bar: lowest to highest grouping)")
    left.set_title(title)
    left.legend()
    right.set_yscale("log")
    right.set_ylabel("|p - p of the backbone|, mean (bar: up to the 99th percentile)")
    right.set_title("probabilities")
    for axes in (left, right):
        axes.set_xlabel("speed-up (arithmetic, adapters counted)")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(reports: dict[str, dict[str, Any]], names: Iterable[str] | None) -> Iterator[Line]:
    """The rivals, then one line per report and way: what is merged, multiplexed, both, stopped."""
    exits = [("", row) for row in best_exits(reports.values()).values()]
    yield Line("early exit", "o--", "black", exits)
    cascade = [("", row) for row in next(iter(reports.values())).get("cascade", [])]
    yield Line("cascade of early exits", "^:", "black", cascade)
    contracts = [(r["name"], r) for r in next(iter(reports.values())).get("contracts", [])]
    yield Line("contract", "D-", "tab:red", contracts)
    for name in reports if names is None else names:
        ways: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for rung, row in reports[name]["rungs"].items():
            way = " and ".join(part.split(":")[0].split("@")[0] for part in rung.split("+"))
            stopped = ", stopped" if "@" in rung and way != "exit" else ""
            ways.setdefault(way + stopped, []).append((rung, row))
        for way, rows in ways.items():
            yield Line(f"{way}, {name}", "s-", None, rows)


def _accuracy(row: dict[str, Any]) -> Point:
    found = row["accuracy"]
    if not isinstance(found, dict):  # what does not depend on company
        found = dict.fromkeys(("mean", "min", "max"), found)
    return Point(*(100 * found[key] for key in ("mean", "min", "max")))


def _distance(row: dict[str, Any]) -> Point:
    near = row["probabilities"]
    return Point(near["distance_mean"], near["distance_mean"], near["distance_p99"])


def _draw(axes: Any, line: Line, measure: Measure, alone: Point | None) -> None:
    """One line; from ``alone``, the backbone by itself, where it is a rival's."""
    rows = sorted(line.rows, key=lambda item: item[1]["speedup"])
    points = [(row["speedup"], measure(row)) for _, row in rows]
    if not points:
        return
    if line.colour and alone is not None:
        points = sorted([(1.0, alone), *points])
    spread = [[p.value - p.low for _, p in points], [p.high - p.value for _, p in points]]
    axes.errorbar(
        [speedup for speedup, _ in points],
        [point.value for _, point in points],
        yerr=spread,
        fmt=line.style,
        capsize=3,
        color=line.colour,
        label=line.name,
        elinewidth=0.8,
    )
    for name, row in rows:
        place = row["speedup"], measure(row).value
        axes.annotate(name, place, xytext=(6, 5), textcoords="offset points", fontsize=8)
