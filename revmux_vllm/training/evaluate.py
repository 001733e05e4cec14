"""Accuracy as the protocol has it: ten shuffled groupings, beside the backbone and early exit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.config import layer_limit
from revmux_vllm.planning.contract import Contract
from revmux_vllm.planning.packing import pack_rungs
from revmux_vllm.problems import Problem
from revmux_vllm.reference import run_rung
from revmux_vllm.rungs import Rung
from revmux_vllm.terminal import followed
from revmux_vllm.training import cascade
from revmux_vllm.training.contract import observe, walk
from revmux_vllm.training.cost import Costs
from revmux_vllm.training.features import Features
from revmux_vllm.training.scores import compare

NUM_GROUPINGS = 10
WINDOW = 64  # requests that wait together and are packed together

Groups = list[tuple[Rung, tuple[int, ...]]]
# Probabilities (B, C) of all rows at one rung; the last argument is the order and windows of the
# rows, and the groups that these make.
Predict = Callable[[Rung, Groups, Sequence[Any]], Tensor]


@torch.no_grad()
def predict(
    backbone: Backbone,
    ladder: AdapterLadder,
    features: Features,
    groups: Groups,
    composites_per_batch: int = 32,
) -> Tensor:
    """Logits (B, C) under ``groups`` of rows; what runs alone is the backbone's own answer."""
    device = next(ladder.parameters()).device
    logits = features.logits.clone()
    for rung, adapter in ladder.items():
        index = torch.tensor([group for at, group in groups if at == rung])
        if not len(index):
            continue
        index = index[features.lengths[index[:, 0]].argsort()]
        for part in index.split(composites_per_batch):
            lengths = features.lengths[part].to(device)
            hidden = features.padded(part.flatten()).to(device).unflatten(0, (-1, rung.mux))
            vectors = run_rung(backbone, adapter, hidden, lengths, features.shared)
            logits[part.flatten()] = backbone.head(vectors.flatten(0, 1)).cpu()
    return logits


def windows(count: int, window: int) -> Iterator[list[Any]]:
    """Ten shuffles of ``count`` rows from fixed seeds, each cut into what waits together."""
    for seed in range(NUM_GROUPINGS):
        order = np.random.default_rng(seed).permutation(count)
        yield [order[start : start + window] for start in range(0, count, window)]


def group_windows(parts: Sequence[Any], lengths: Sequence[int], rungs: Sequence[Rung]) -> Groups:
    """Each window packed as serving packs it."""
    return [
        (rung, tuple(int(rows[i]) for i in group))
        for rows in parts
        for rung, group in pack_rungs([lengths[row] for row in rows], rungs)
    ]


def evaluate(
    backbone: Backbone,
    ladder: AdapterLadder,
    exits: nn.ModuleDict,
    features: Features,
    names: Sequence[str],
    window: int = WINDOW,
    answer: Predict | None = None,
    thresholds: Mapping[float, float] | None = None,
    contracts: Sequence[Contract] = (),
) -> dict[str, Any]:
    """The report that ``revmux eval --json`` prints; shares between 0 and 1.

    Args:
        backbone: cut as ``ladder`` wants it.
        ladder: adapters to measure.
        exits: early exits to measure; their keys are the layers of ``features.exits``.
        features: of labelled rows.
        names: of the classes.
        window: requests that are packed together.
        answer: computes the probabilities, the backbone's own too; default: the reference on
            ``features``.
        thresholds: of the cascade of early exits, by the agreement they were chosen for.
        contracts: that the checkpoint is calibrated for.
    """
    lengths = features.lengths.tolist()
    config, problem = ladder.config, backbone.problem
    costs = Costs(backbone, round(sum(lengths) / len(lengths)))

    def reference(rung: Rung, groups: Groups, parts: Sequence[Any]) -> Tensor:
        return problem.read(predict(backbone, ladder, features, groups))

    shuffles = list(windows(len(lengths), window))
    own = answer(Rung(), [], shuffles[0]) if answer else problem.read(features.logits)
    alone = compare([own], own, features.labels, problem)
    report: dict[str, Any] = {
        "backbone": alone | {"accuracy": alone["accuracy"]["mean"]},
        "problem": str(problem),
        "mean_tokens": sum(lengths) / len(lengths),
        "rungs": {},
    }
    # Without a composite the company does not matter: one round is all ten.
    rounds = [(r, s) for r in config.rungs for s in (shuffles if r.mux > 1 else shuffles[:1])]
    answers: dict[Rung, list[Tensor]] = {rung: [] for rung in config.rungs}
    for rung, parts in followed(rounds, "groupings"):
        groups = group_windows(parts, lengths, config.kind(rung))
        answers[rung].append((answer or reference)(rung, groups, parts))
    report |= _exit_rows(exits, features, own, costs, thresholds or {}, problem)
    report["contracts"] = _contract_rows(contracts, backbone, ladder, features, own, costs)
    for rung, given in answers.items():
        row = {
            "prefill_layers": config.prefill_layers,
            "layer_limit": layer_limit(rung, config.prefill_layers, backbone.num_layers),
            "speedup": costs.speedup(ladder, rung),
        } | compare(given, own, features.labels, problem)
        report["rungs"][str(rung)] = row | _against(row, report)
    return report | {"classes": list(names)}


@torch.no_grad()
def exit_probabilities(exits: nn.ModuleDict, features: Features, problem: Problem) -> Tensor:
    """What every early exit says: (B, E, ...), see ``Problem``."""
    given = []
    for place, head in enumerate(exits.values()):
        states = features.exits[:, place].float().to(next(head.parameters()).device)
        given.append(problem.read(problem.answers(head(states))).cpu())
    if not given:
        return features.logits[:, None][:, :0]
    return torch.stack(given, dim=1)


def _exit_rows(
    exits: nn.ModuleDict,
    features: Features,
    own: Tensor,
    costs: Costs,
    thresholds: Mapping[float, float],
    problem: Problem,
) -> dict[str, Any]:
    """The two lines of the rival: each early exit by itself, and the cascade of them."""
    given = exit_probabilities(exits, features, problem)
    static = [
        {"layer": int(layer), "speedup": costs.exit_speedup(head, int(layer))}
        | _one_way(given[:, place], own, features.labels, problem)
        for place, (layer, head) in enumerate(exits.items())
    ]
    passed = costs.cascade(exits)
    adaptive = []
    for target, threshold in thresholds.items():
        walked = cascade.walk(given, own, threshold)
        adaptive.append(
            {
                "target": target,
                "threshold": threshold,
                "speedup": cascade.speedup(walked.place, passed),
            }
            | _one_way(walked.answers, own, features.labels, problem)
        )
    return {"early_exit": static, "cascade": adaptive}


def _contract_rows(
    contracts: Sequence[Contract],
    backbone: Backbone,
    ladder: AdapterLadder,
    features: Features,
    own: Tensor,
    costs: Costs,
) -> list[dict[str, Any]]:
    """What every promise gives on these rows."""
    rows = []
    together = {contract.stops for contract in contracts}
    every = {stops: observe(backbone, ladder, features, stops) for stops in together}
    for contract in contracts:
        seen = every[contract.stops]
        left = walk(contract, seen)
        passed = costs.until_stops([ladder[stop] for stop in contract.stops])
        shares = torch.bincount(left.place, minlength=len(passed)) / len(left.place)
        places = [*map(str, contract.stops), "alone"]
        rows.append(
            {
                "name": str(contract),
                "agreement_promised": contract.agreement,
                "speedup": cascade.speedup(left.place, passed),
                "shares": dict(zip(places, shares.tolist(), strict=True)),
            }
            | _one_way(left.answers.softmax(-1), own, features.labels, backbone.problem)
        )
    return rows


def _one_way(answers: Tensor, own: Tensor, labels: Tensor, problem: Problem) -> dict[str, Any]:
    """Scores of what does not depend on company."""
    scores = compare([answers], own, labels, problem)
    return {
        "accuracy": scores["accuracy"]["mean"],
        "agreement": scores["agreement"]["mean"],
        "probabilities": scores["probabilities"],
    }


def _against(row: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement of a rung, less that of either line of the rival at the rung's speed-up."""
    mine = row["agreement"]["mean"]
    found: dict[str, Any] = {}
    for line in ("early_exit", "cascade"):
        theirs = agreement_at(report[line], row["speedup"])
        found[f"ahead_of_{line}"] = None if theirs is None else mine - theirs
    return found


def agreement_at(line: Sequence[Mapping[str, Any]], speedup: float) -> float | None:
    """Agreement of a line of the rival at a speed-up, between its points; None beyond them."""
    points = sorted([(1.0, 1.0), *((row["speedup"], row["agreement"]) for row in line)])
    if not line or speedup > points[-1][0]:
        return None
    speedups, agreements = zip(*points, strict=True)
    return float(np.interp(speedup, speedups, agreements))
