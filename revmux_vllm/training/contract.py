"""Calibrate an accuracy contract: fit how sure each stop is, and find thresholds that keep it.

One half of the rows fits the trust of every stop. It also fixes a path of thresholds, from nobody
leaves to everybody does: at price c a row leaves where the chance of another answer than the
backbone's is at most c times the share of the work that leaving saves. The other half tests the
points of that path in this order, each by an exact binomial bound, until one fails (fixed-sequence
testing: Angelopoulos et al., "Learn then Test", 2021). So the last one that passed keeps the
promise with the stated confidence, for rows that are drawn like these.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.adapters.trust import margins, trust
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.errors import UserError
from revmux_vllm.planning.contract import Contract
from revmux_vllm.reference import run_path
from revmux_vllm.rungs import Rung
from revmux_vllm.training.features import Features

PRICES = np.geomspace(1e-4, 10, 240)
ROWS_PER_BATCH = 64


@dataclass(frozen=True)
class Seen:
    """What the stops said of some rows, and what the backbone says.

    Attributes:
        stops: logits (B, S, C).
        own: (B, C).
    """

    stops: Tensor
    own: Tensor

    def __len__(self) -> int:
        return len(self.own)

    def select(self, rows: Tensor) -> "Seen":
        """Some of the rows."""
        return Seen(self.stops[rows], self.own[rows])


@dataclass(frozen=True)
class Terms:
    """What is to be promised; see ``Contract``."""

    agreement: float
    confidence: float = 0.95
    probability: float | None = None
    per_class: bool = False


@dataclass(frozen=True)
class Left:
    """Where rows left.

    Attributes:
        place: (B,) the stop; the number of stops for those that went to the end.
        answers: (B, C) logits.
    """

    place: Tensor
    answers: Tensor


def stops_of(ladder: AdapterLadder) -> list[Rung]:
    """The exits of a ladder, by depth.

    Raises:
        UserError: where it has none.
    """
    exits = [rung for rung in ladder.config.rungs if rung.shortening * rung.mux == 1]
    if not exits:
        cure = "train some: --rungs exit@L,..."
        raise UserError("rungs", "the checkpoint has no `exit@L` to stop at", cure=cure)
    return sorted(exits, key=lambda rung: rung.stop)


@torch.no_grad()
def observe(
    backbone: Backbone, ladder: AdapterLadder, features: Features, stops: Sequence[Rung]
) -> Seen:
    """What every stop says of all rows."""
    device = next(ladder.parameters()).device
    said = torch.empty(len(features), len(stops), features.logits.shape[-1])
    paths = [[s for s in stops if s.exit], [s for s in stops if not s.exit]]
    for rows in features.lengths.argsort().split(ROWS_PER_BATCH):
        hidden = features.padded(rows).to(device)[:, None]
        lengths = features.lengths[rows].to(device)[:, None]
        for path in filter(None, paths):
            adapters = [ladder[stop] for stop in path]
            passed = run_path(backbone, adapters, hidden, lengths, features.shared)
            for stop in path:
                vectors = passed.read(ladder[stop])[:, 0]
                said[rows, stops.index(stop)] = backbone.head(vectors).float().cpu()
    return Seen(said, features.logits)


def calibrate(
    seen: Seen, stops: Sequence[Rung], costs: Sequence[float], terms: Terms, seed: int = 0
) -> Contract:
    """A contract over these stops.

    Args:
        seen: of rows that neither the backbone nor the adapters were trained on.
        stops: by depth.
        costs: share of the backbone's work until each stop, heads counted, and last of the whole
            way; see ``Costs.until_stops``.
        terms: what to promise.
        seed: of the halves.

    Raises:
        UserError: where the rows are too few to promise it, saying how many are needed, or where
            even the surest answers break it.
    """
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    fit, test = (seen.select(half) for half in order.chunk(2))
    weights, biases = _fit(fit, terms)
    trusts = _trusts(test, weights, biases)
    wrong = _wrong(test, terms)  # (B, S)
    saved = 1 - np.array(costs[:-1])
    kept = None
    for price in PRICES:
        thresholds = _thresholds(price, saved)
        place = _places(trusts, thresholds)
        if not _holds(test, wrong, place, terms):
            break
        kept = thresholds, place
    if kept is None:
        raise _too_few(test, terms)
    thresholds, place = kept
    found = _mistakes(wrong, place)
    return Contract(
        **vars(terms),
        stops=tuple(stops),
        weights=tuple(map(tuple, weights)),
        biases=tuple(biases),
        thresholds=tuple(None if math.isinf(t) else float(t) for t in thresholds),
        speedup=1 / float(np.array(costs)[place].mean()),
        measured=1 - float(found.mean()),
        shares=tuple(float((place == i).mean()) for i in range(len(stops))),
        rows=len(test),
    )


def walk(contract: Contract, seen: Seen) -> Left:
    """Let rows leave as a server would."""
    trusts = _trusts(seen, contract.weights, contract.biases)
    thresholds = [math.inf if t is None else t for t in contract.thresholds]
    place = torch.from_numpy(_places(trusts, np.array(thresholds)))
    every = torch.cat([seen.stops, seen.own[:, None]], dim=1)
    return Left(place, every[torch.arange(len(seen)), place])


def _fit(seen: Seen, terms: Terms) -> tuple[list[list[float]], list[float]]:
    """Weights and bias of every stop's trust."""
    from sklearn.linear_model import LogisticRegression

    right = ~_wrong(seen, terms)
    weights, biases = [], []
    for i in range(seen.stops.shape[1]):
        known = margins(seen.stops[:, : i + 1]).numpy()
        target = right[:, i]
        if target.all() or not target.any():
            hits, count = int(target.sum()), len(target)
            weights.append([0.0] * (i + 1))
            biases.append(math.log((hits + 0.5) / (count - hits + 0.5)))
            continue
        fitted = LogisticRegression(C=1.0, max_iter=1000).fit(known, target)
        weights.append([float(w) for w in fitted.coef_[0]])
        biases.append(float(fitted.intercept_[0]))
    return weights, biases


def _trusts(seen: Seen, weights: Sequence[Sequence[float]], biases: Sequence[float]) -> np.ndarray:
    """(B, S)"""
    columns = [
        trust(seen.stops[:, : i + 1], torch.tensor(own), torch.tensor(bias))
        for i, (own, bias) in enumerate(zip(weights, biases, strict=True))
    ]
    return torch.stack(columns, dim=1).numpy()


def _wrong(seen: Seen, terms: Terms) -> np.ndarray:
    """(B, S): the answer of a stop breaks the promise."""
    broken = seen.stops.argmax(-1) != seen.own.argmax(-1)[:, None]
    if terms.probability is not None:
        distance = seen.stops.softmax(-1) - seen.own.softmax(-1)[:, None]
        broken |= distance.abs().amax(-1) > terms.probability
    return broken.numpy()


def _thresholds(price: float, saved: np.ndarray) -> np.ndarray:
    """Least trust (S,), in log odds, at a price."""
    odds = np.clip(price * saved, 1e-12, 1 - 1e-12)  # of being wrong, at most
    return np.log1p(-odds) - np.log(odds)


def _places(trusts: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(B,) the first stop with trust enough, or the number of stops."""
    sure = np.concatenate([trusts >= thresholds, np.ones((len(trusts), 1), bool)], axis=1)
    return sure.argmax(1)


def _mistakes(wrong: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(B,) those that left with an answer that breaks the promise."""
    ended = np.concatenate([wrong, np.zeros((len(wrong), 1), bool)], axis=1)
    return ended[np.arange(len(wrong)), place]


def _holds(seen: Seen, wrong: np.ndarray, place: np.ndarray, terms: Terms) -> bool:
    """Whether the promise passes its test: in all, or in every class."""
    from scipy.stats import binom

    mistakes, groups = _mistakes(wrong, place), _groups(seen, terms)
    level = (1 - terms.confidence) / len(groups)  # all of them at once
    return all(
        binom.cdf(mistakes[rows].sum(), rows.sum(), 1 - terms.agreement) <= level for rows in groups
    )


def _groups(seen: Seen, terms: Terms) -> list[np.ndarray]:
    """Masks (B,) of the rows that the promise is about by themselves."""
    if not terms.per_class:
        return [np.ones(len(seen), bool)]
    classes = seen.own.argmax(-1).numpy()
    return [classes == c for c in range(seen.own.shape[-1])]


def _too_few(seen: Seen, terms: Terms) -> UserError:
    """Why nothing can be promised: with no mistake at all it takes so many rows."""
    groups = _groups(seen, terms)
    level = (1 - terms.confidence) / len(groups)
    needed = math.ceil(math.log(level) / math.log(terms.agreement))
    least = min(int(rows.sum()) for rows in groups)
    what = "of the backbone's rarest class " if terms.per_class else ""
    if least >= needed:
        cure = "promise less, give more rows, or train exits that know more"
        problem = "even the surest answers of the first stop break it"
        return UserError("`agreement`", problem, found=terms.agreement, cure=cure)
    return UserError(
        "`data`",
        f"{least} rows {what}test the promise, half of those given",
        expected=f"at least {needed} for {terms.agreement:g} with confidence {terms.confidence:g}",
        cure=f"give {2 * needed} rows or more{' of every class' if terms.per_class else ''}; they "
        "need no labels",
    )
