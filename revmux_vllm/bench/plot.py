"""Latency against offered load, and the rungs that ran."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from revmux_vllm.bench.summary import SIDES
from revmux_vllm.bench.tables import rung_names, rung_shares

COLOURS = {"revmux": "tab:blue", "plain": "black"}
STYLES = {"p99_ms": "o-", "p50_ms": "o--"}


def plot_load(report: dict[str, Any], path: Path) -> None:
    """Draw the report of ``revmux bench online``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"height_ratios": (3, 1)}
    figure, (latency, rungs) = pyplot.subplots(
        2, 1, figsize=(8, 7), sharex=True, layout="constrained", gridspec_kw=panels
    )
    _draw_latency(latency, report)
    _draw_rungs(rungs, report)
    latency.set_title(
        f"{report['model']}, {report['arrivals']} arrivals, lengths {report['lengths']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_latency(axes: Any, report: dict[str, Any]) -> None:
    for name in SIDES:
        for key, style in STYLES.items():
            drawn = [p for p in report["points"] if p[name][key] is not None]
            offered = [point["offered"] for point in drawn]
            latencies = [point[name][key] for point in drawn]
            label = f"{name}, {key.removesuffix('_ms')}"
            axes.plot(offered, latencies, style, color=COLOURS[name], label=label)
    capacity, limit = report["plain_capacity"], report["points"][-1]["layer_limit"]
    axes.axvline(capacity, color="grey", linestyle=":", label="plain vLLM's capacity")
    if limit is not None:
        label = f"layer limit ({limit:.2f}) times it"
        axes.axvline(limit * capacity, color="tab:green", linestyle=":", label=label)
    slo_ms = report["sustained"]["slo_ms"]
    axes.axhline(slo_ms, color="tab:red", linewidth=0.8, label=f"{slo_ms:g} ms")
    axes.set_yscale("log")
    axes.set_ylabel("latency, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_rungs(axes: Any, report: dict[str, Any]) -> None:
    offered = [point["offered"] for point in report["points"]]
    gaps = [after - before for before, after in pairwise(offered)]
    width = min(0.6 * gap for gap in (*gaps, offered[0]))
    below = [0.0] * len(offered)
    for rung in rung_names(report):
        shares = [100 * rung_shares(point).get(rung, 0.0) for point in report["points"]]
        axes.bar(offered, shares, width, bottom=below, label=rung)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    axes.set_xlabel("offered load, requests/s")
    axes.set_ylabel("requests by rung, %")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
