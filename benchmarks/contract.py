"""Accuracy contracts against simpler ways to stop, and how often a promise is kept.

All ways stop at the same exits of one checkpoint and are chosen on the same rows, by the same test
with the same confidence, and measured on others:

* trust: what `revmux calibrate` does, a fitted sum of margins and a threshold for every stop;
* probability: one threshold on the largest probability for all stops, the cascade of the
  literature. It fits nothing, so all rows test it;
* unbounded: the same, but the least threshold that keeps the agreement on those rows, untested;
* through merge:N@L, for every such rung: what is not sure after the cut runs merged first, and what
  is not sure there either climbs: it runs again alone from the cut on, from stop to stop.

`--draws` then calibrates on random halves of all rows together and counts on the other halves.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import binom
from torch import Tensor

from revmux_vllm.rungs import Rung
from revmux_vllm.terminal import AsJson
from revmux_vllm.training import cascade, measure
from revmux_vllm.training import contract as contracts
from revmux_vllm.training.contract import Seen, Terms, walk
from revmux_vllm.training.cost import Costs
from revmux_vllm.training.scores import alike, share

AGREEMENTS = "0.95,0.98,0.99,0.995"
TRIED = 400
"""Thresholds on the largest probability."""


class Stopping:
    """The exits of a checkpoint, and what they say of rows.

    Args:
        checkpoint: folder or bundled name.
        rows: files; of the last one the mean length counts.
    """

    def __init__(self, checkpoint: Path, rows: list[str]) -> None:
        self.seen: list[Seen] = []
        self.merged: dict[Rung, list[Tensor]] = {}  # (B, C) that each says of every file's rows
        self.extra: dict[Rung, float] = {}  # share of the work that each is, from the cut on
        for name in rows:
            subject = measure.load(
                checkpoint, name, text_columns=None, label_column=None, max_tokens=256
            )
            self.stops, self.costs, seen = measure.at_stops(subject)
            self.seen.append(seen)
            backbone, ladder, features = subject.backbone, subject.ladder, subject.features
            counted = Costs(backbone, round(features.lengths.float().mean().item()))
            self.lower = counted.lower / (counted.lower + counted.upper)
            for rung in ladder.config.rungs:
                if rung.mux == 1 and rung.shortening > 1 and rung.stop:
                    said = contracts.observe(backbone, ladder, features, [rung]).stops[:, 0]
                    self.merged.setdefault(rung, []).append(said)
                    self.extra[rung] = 1 / counted.speedup(ladder, rung) - self.lower

    def by_trust(self, own: Seen, other: Seen, terms: Terms) -> dict[str, float]:
        """Calibrated on ``own``, measured on ``other``."""
        left = walk(contracts.calibrate(own, self.stops, self.costs, terms), other)
        return self._row(left.answers, left.place, other, self.costs)

    def by_climbing(self, rung: Rung, terms: Terms) -> dict[str, float]:
        """The same over the stop after the cut, ``rung``, and then the other stops."""
        first = [stop for stop in self.stops if stop.exit]
        stops = [*first, rung, *self.stops[len(first) :]]
        extra = self.extra[rung]
        until = self.costs[len(first) - 1] if first else self.lower
        costs = [*self.costs[: len(first)], until + extra]
        costs += [cost + extra for cost in self.costs[len(first) :]]
        own, other = (
            Seen(
                torch.cat([s[:, : len(first)], said[:, None], s[:, len(first) :]], dim=1), seen.own
            )
            for seen, said in zip(self.seen, self.merged[rung], strict=True)
            for s in [seen.stops]
        )
        left = walk(contracts.calibrate(own, stops, costs, terms), other)
        return self._row(left.answers, left.place, other, costs)

    def by_probability(
        self, own: Seen, other: Seen, terms: Terms, tested: bool
    ) -> dict[str, float]:
        """One threshold for all stops."""
        chosen = 1.0 + 1e-6
        for threshold in 1 - np.geomspace(1e-7, 0.5, TRIED):
            walked = cascade.walk(own.stops.softmax(-1), own.own.softmax(-1), float(threshold))
            right = walked.answers.argmax(-1) == own.own.argmax(-1)
            if tested:
                wrong, level = int((~right).sum()), 1 - terms.confidence
                kept = binom.cdf(wrong, len(right), 1 - terms.agreement) <= level
            else:
                kept = right.float().mean() >= terms.agreement
            if not kept:
                break
            chosen = float(threshold)
        walked = cascade.walk(other.stops.softmax(-1), other.own.softmax(-1), chosen)
        return self._row(walked.answers, walked.place, other, self.costs)

    def _row(
        self, answers: Tensor, place: Tensor, seen: Seen, costs: list[float]
    ) -> dict[str, float]:
        agreement = share(alike(answers, seen.own))
        return {"agreement": agreement, "speedup": cascade.speedup(place, costs)}


def coverage(stopping: Stopping, terms: Terms, draws: int) -> dict[str, float]:
    """Of calibrations on random halves: how often the other half kept the promise by itself, and
    how often it broke it by more than chance allows, and the mean speed-up."""
    first, second = stopping.seen
    every = Seen(torch.cat([first.stops, second.stops]), torch.cat([first.own, second.own]))
    kept, refuted, speedups = 0, 0, []
    for seed in track(range(draws), "calibrating on halves", console=Console(stderr=True)):
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        own, other = (every.select(half) for half in order.chunk(2))
        found = stopping.by_trust(own, other, terms)
        wrong = round((1 - found["agreement"]) * len(other))
        kept += found["agreement"] >= terms.agreement
        refuted += binom.sf(wrong - 1, len(other), 1 - terms.agreement) < 0.05
        speedups.append(found["speedup"])
    return {
        "kept": kept / draws,
        "refuted": refuted / draws,
        "speedup": math.fsum(speedups) / draws,
    }


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with exits, or a bundled name.")],
    data: Annotated[str, typer.Option(help="Rows to calibrate on.")],
    dev: Annotated[str, typer.Option(help="Rows to measure on.")],
    agreement: Annotated[str, typer.Option(help="To promise, with commas between.")] = AGREEMENTS,
    draws: Annotated[int, typer.Option(help="Calibrations on random halves, of each.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare ways to stop at the exits of a checkpoint."""
    stopping = Stopping(checkpoint, [data, dev])
    own, other = stopping.seen
    found: dict[str, dict[str, Any]] = {}
    for promised in map(float, agreement.split(",")):
        terms = Terms(promised)
        found[f"{promised:g}"] = {
            "trust": stopping.by_trust(own, other, terms),
            "probability": stopping.by_probability(own, other, terms, tested=True),
            "unbounded": stopping.by_probability(own, other, terms, tested=False),
            **{f"through {rung}": stopping.by_climbing(rung, terms) for rung in stopping.merged},
            **({"draws": coverage(stopping, terms, draws)} if draws else {}),
        }
    if as_json:
        print(json.dumps(found))
        return
    table = Table("promised", "way", "agreement on dev", "speed-up")
    for promised, ways in found.items():
        for way, row in ways.items():
            kept = (
                f"{row['agreement']:.2%}"
                if "agreement" in row
                else f"{row['kept']:.1%} kept, {row['refuted']:.1%} refuted"
            )
            table.add_row(promised, way, kept, f"{row['speedup']:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
