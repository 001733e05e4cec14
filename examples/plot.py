"""The demo as a picture: throughput beside plain vLLM, and what the requests ran on."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

PLAIN_COLOUR, OURS, LIMIT = "0.6", "tab:blue", "tab:red"


def plot_demo(found: Mapping[str, Any], model: str, path: Path) -> None:
    """Draw it.

    Args:
        found: comparisons by name; see ``demo.Comparison``.
        model: for the title.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"width_ratios": (3, 2)}
    figure, (rates, rungs) = pyplot.subplots(
        1, 2, figsize=(10, 4), layout="constrained", gridspec_kw=panels
    )
    _draw_rates(rates, found)
    _draw_rungs(rungs, found)
    figure.suptitle(f"{model} beside plain vLLM, by turns on one machine")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_rates(axes: Any, found: Mapping[str, Any]) -> None:
    names, place = [], 0.0
    for name, one in found.items():
        for where, ours, plain in (
            ("HTTP", one.rates, one.plain_rates),
            ("engine", one.engine_rates, one.plain_engine_rates),
        ):
            for offset, colour, values in ((-0.2, PLAIN_COLOUR, plain), (0.2, OURS, ours)):
                middle = median(values)
                spread = [[middle - min(values)], [max(values) - middle]]
                axes.bar(place + offset, middle, 0.4, color=colour, yerr=spread, capsize=3)
            ratio = f"{median(ours) / median(plain):.2f}x"
            axes.annotate(ratio, (place + 0.2, max(ours)), ha="center", va="bottom")
            limit = one.limit * median(plain)
            axes.plot([place, place + 0.4], [limit, limit], color=LIMIT)
            names.append((place, f"{name},\n{where}"))
            place += 1.0
    for colour, label in ((PLAIN_COLOUR, "plain vLLM"), (OURS, "RevMUX")):
        axes.bar(0, 0, color=colour, label=label)
    axes.plot([], [], color=LIMIT, label="layer limit")
    axes.set_xticks([at for at, _ in names], [name for _, name in names])
    axes.set_ylabel("texts per second")
    axes.margins(y=0.12)
    axes.legend(loc="lower right")


def _draw_rungs(axes: Any, found: Mapping[str, Any]) -> None:
    every = sorted({rung for one in found.values() for rung in one.rung_counts})
    left = [0.0] * len(found)
    for rung in every:
        shares = [100 * one.rung_counts[rung] / one.rung_counts.total() for one in found.values()]
        axes.barh(range(len(found)), shares, 0.5, left=left, label=rung)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    answers = (f"{name}\n{one.agreement:.1%} same label" for name, one in found.items())
    axes.set_yticks(range(len(found)), answers)
    axes.set_xlabel("requests by rung, %")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)
