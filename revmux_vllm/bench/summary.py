"""How much load each server sustains."""

from collections.abc import Sequence
from typing import Any

SIDES = ("revmux", "plain")
ACHIEVED = 0.95
"""Share of the offered load that a sustained one achieves."""
STEADY = 1.15
"""Plain vLLM's throughput over its capacity, beyond which something else ran beside the burst."""


def summarise(points: Sequence[dict[str, Any]], slo_ms: float) -> dict[str, Any]:
    """The highest load that each server sustained, and the ratio of the two.

    Args:
        points: of ``online.measure``, ascending.
        slo_ms: 99 of 100 requests are answered within it.

    Returns:
        Offered requests per second by server, None where no load was sustained; ``at_least`` names
        those that sustained the highest load of all, so more might have done.
    """
    best = {name: _highest(points, name, slo_ms) for name in SIDES}
    known = best["revmux"] is not None and best["plain"] is not None
    highest = max(point["offered"] for point in points)
    return {
        "slo_ms": slo_ms,
        **best,
        "ratio": best["revmux"] / best["plain"] if known else None,
        "at_least": [name for name in SIDES if best[name] == highest],
    }


def _highest(points: Sequence[dict[str, Any]], name: str, slo_ms: float) -> Any:
    sustained = [p["offered"] for p in points if is_sustained(p["offered"], p[name], slo_ms)]
    return max(sustained, default=None)


def is_sustained(offered: float, side: dict[str, Any], slo_ms: float) -> bool:
    """Whether the tail kept ``slo_ms`` and the answers came as fast as the requests."""
    in_time = side["p99_ms"] is not None and side["p99_ms"] <= slo_ms
    return bool(in_time and side["achieved"] >= ACHIEVED * offered)


def in_words(report: dict[str, Any]) -> list[str]:
    """The summary and which part was the limit, as sentences."""
    sustained, points, capacity = (report[k] for k in ("sustained", "points", "plain_capacity"))
    words = [f"With p99 within {sustained['slo_ms']:g} ms and {ACHIEVED:.0%} of the load answered:"]
    for name in SIDES:
        rate = sustained[name]
        if rate is None:
            words.append(f"  {name} sustained none of these loads")
        else:
            more = "at least " if name in sustained["at_least"] else ""
            words.append(f"  {name} sustained {more}{rate:.1f} requests/s")
    top = points[-1]
    if (ratio := sustained["ratio"]) is not None:
        limit = top["layer_limit"]
        beside = (
            "" if limit is None else f"; layer limit of what ran at {top['load']:g}x {limit:.2f}"
        )
        words.append(f"  ratio {ratio:.2f}{beside}")
    limits = [f"{name} {top[name]['limit'] or 'unknown'}" for name in SIDES]
    words.append(f"The limit at {top['load']:g}x: {', '.join(limits)}.")
    most = max(point["plain"]["achieved"] for point in points)
    if most > STEADY * capacity:
        words.append(
            f"Plain vLLM answered {most:.1f} requests/s, more than the {capacity:.1f} of its "
            "burst: the machine did not stay the same, so measure again."
        )
    return words
