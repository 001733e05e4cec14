"""The reports of both benchmarks for a terminal."""

from typing import Any

from rich.table import Table

from revmux_vllm.bench.summary import SIDES

LATENCIES = {"achieved": "achieved/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms"}
TIMES = {"queue_ms": "queue", "inference_ms": "inference", "rest_ms": "rest"}


def offline_table(report: dict[str, Any]) -> Table:
    """Every rung beside plain vLLM."""
    table = Table(
        title=f"{report['requests']} prompts of {report['mean_tokens']:.0f} tokens on average, "
        f"{report['dtype']}, median of {report['rounds']} rounds",
        caption="arithmetic: everything counted at that length, attention too",
    )
    ratios = "ratio (lowest to highest)", "layer limit", "ratio / limit"
    for column in ("", "requests/s", *ratios, "arithmetic", "ratio / arithmetic"):
        table.add_column(column, justify="right" if column else "left")
    plain = f"{report['plain_requests_per_s']:.1f}"
    table.add_row(report["baseline"], plain, "1", "1", "", "1", "")
    if own := report.get("transformers_requests_per_s"):
        ratio = f"{own / report['plain_requests_per_s']:.2f}"
        table.add_row("transformers, batches of 32", f"{own:.1f}", ratio)
    for row in report["configurations"]:
        table.add_row(
            f"{row['rung']}, l={row['prefill_layers']}",
            f"{row['requests_per_s']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            f"{row['layer_limit']:.2f}",
            f"{row['ratio_over_limit']:.2f}",
            f"{row['arithmetic']:.2f}",
            f"{row['ratio_over_arithmetic']:.2f}",
        )
    return table


def points_table(report: dict[str, Any]) -> Table:
    """Throughput and latency of both servers at every load."""
    table = Table(
        title=f"{report['arrivals']} arrivals for {report['seconds']:g} s, lengths "
        f"{report['lengths']}; plain vLLM's capacity {report['plain_capacity']:.1f} requests/s"
    )
    for column in ("load", "offered/s", "", *LATENCIES.values(), "errors"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for point in report["points"]:
        load = [f"{point['load']:g}x", f"{point['offered']:.1f}"]
        for name in SIDES:
            side = point[name]
            cells = [_number(side[key]) for key in LATENCIES]
            table.add_row(*load, name, *cells, str(side["errors"]))
            load = ["", ""]
        table.add_section()
    return table


def times_table(report: dict[str, Any]) -> Table:
    """Where the time went at every load."""
    table = Table(
        title="Milliseconds per request, mean: the engine's, and the rest",
        caption="rest: HTTP, tokenising, the client, and the wait for a running step; "
        "API CPU: of one core",
    )
    for column in ("load", "", *TIMES.values(), "API CPU", "limit"):
        table.add_column(
            column, justify="left" if column in ("", "limit") else "right", no_wrap=True
        )
    for point in report["points"]:
        load = f"{point['load']:g}x"
        for name in SIDES:
            side = point[name]
            cells = [_number(side[key]) for key in TIMES]
            cpu = "" if side["front_end_cpu"] is None else f"{side['front_end_cpu']:.0%}"
            table.add_row(load, name, *cells, cpu, side["limit"] or "")
            load = ""
        table.add_section()
    return table


def rungs_table(report: dict[str, Any]) -> Table:
    """Which rungs ran at every load."""
    rungs = rung_names(report)
    table = Table(title="Requests by rung, per cent")
    for column in ("load", *rungs, "layer limit"):
        table.add_column(column, justify="right")
    for point in report["points"]:
        shares = rung_shares(point)
        limit = point["layer_limit"]
        cells = [f"{100 * shares.get(rung, 0):.0f}" for rung in rungs]
        table.add_row(f"{point['load']:g}x", *cells, "" if limit is None else f"{limit:.2f}")
    return table


def rung_names(report: dict[str, Any]) -> list[str]:
    """Of all rungs that ran at some load."""
    return sorted({rung for point in report["points"] for rung in rung_shares(point)})


def rung_shares(point: dict[str, Any]) -> dict[str, float]:
    """Share of the requests of a load by rung."""
    counts = point["revmux"]["requests_by_rung"]
    total = sum(counts.values())
    return {rung: n / total for rung, n in counts.items()}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
