"""Accuracy against speed-up, the line of early exit beside those of the rungs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PLOT_FILE = "accuracy.png"
"""In a checkpoint folder."""


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

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    backbone = 100 * next(iter(reports.values()))["backbone"]["accuracy"]
    axes.axhline(backbone, color="grey", linewidth=0.8, linestyle=":", label="backbone")
    rivals = {
        "early exit": ("o--", best_exits(reports.values()).values()),
        "cascade of early exits": ("^:", next(iter(reports.values())).get("cascade", [])),
    }
    for name, (style, rows) in rivals.items():
        if rows:
            own = [(row["speedup"], 100 * row["accuracy"]) for row in rows]
            points = sorted([(1.0, backbone), *own])
            axes.plot(*zip(*points, strict=True), style, color="black", label=name)
    for name in reports if lines is None else lines:
        ways: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for rung, row in reports[name]["rungs"].items():
            # One line per way: what is merged, what is multiplexed, what is both.
            way = " and ".join(part.split(":")[0] for part in rung.split("+"))
            ways.setdefault(way, []).append((rung, row))
        for way, rows in ways.items():
            _draw_rungs(axes, f"{way}, {name}", rows)
    axes.set_xlabel("speed-up (arithmetic, adapters counted)")
    axes.set_ylabel("accuracy, per cent")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_rungs(axes: Any, name: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    ordered = sorted(rows, key=lambda item: item[1]["speedup"])
    speedups = [row["speedup"] for _, row in ordered]
    means = [100 * row["accuracy"]["mean"] for _, row in ordered]
    spread = [
        [100 * (row["accuracy"]["mean"] - row["accuracy"]["min"]) for _, row in ordered],
        [100 * (row["accuracy"]["max"] - row["accuracy"]["mean"]) for _, row in ordered],
    ]
    axes.errorbar(speedups, means, yerr=spread, fmt="s-", capsize=3, label=name)
    for (rung, _), speedup, mean in zip(ordered, speedups, means, strict=True):
        axes.annotate(rung, (speedup, mean), xytext=(6, 5), textcoords="offset points", fontsize=8)
