"""A checkpoint under an accuracy contract, and what the reference says its answers are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from conftest import RecordingEngine, random_prompts
from prometheus_client.parser import text_string_to_metric_families

from revmux_vllm import checkpoint
from revmux_vllm.adapters.trust import trust
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.planning.contract import Contract
from revmux_vllm.reference import classify
from revmux_vllm.rungs import Rung
from revmux_vllm.training.contract import Seen, stops_of, walk

AGREEMENT = 0.9
UNDER_CONTRACT: dict[str, Any] = {
    "additional_config": {"revmux": {"agreement": AGREEMENT, "shadow_rate": 0}}
}
CLOSE = 1e-3
"""Nearer to a threshold than this, rounding may decide."""


class Promised:
    """A contract at whose every stop about a third of the rows leaves, written into a folder.

    Args:
        folder: a checkpoint with exits.
    """

    def __init__(self, folder: Path) -> None:
        self.ladder = checkpoint.load_adapters(folder)
        words = self.ladder.config.label_words
        self.backbone = load_backbone(checkpoint.backbone_folder(folder), 1, words)
        self.stops = stops_of(self.ladder)
        seen = self.seen(random_prompts(77, 64))
        weights = [tuple(0.5**back for back in range(i, -1, -1)) for i in range(len(self.stops))]
        zero = torch.tensor(0.0)
        trusts = [
            trust(seen.stops[:, : i + 1], torch.tensor(own), zero) for i, own in enumerate(weights)
        ]
        thresholds = [float(one.quantile(0.66)) for one in trusts]
        self.contract = Contract(
            agreement=AGREEMENT,
            confidence=0.95,
            probability=None,
            per_class=False,
            stops=tuple(self.stops),
            weights=tuple(weights),
            biases=(0.0,) * len(self.stops),
            thresholds=tuple(thresholds),
            speedup=1.5,
            measured=1.0,
            shares=(0.3,) * len(self.stops),
            rows=64,
        )
        checkpoint.write_contract(folder, self.contract)

    def seen(self, prompts: Sequence[Sequence[int]]) -> Seen:
        """What every stop, and the backbone, says of ``prompts``."""
        alone = [(i,) for i in range(len(prompts))]

        def at(rung: Rung) -> torch.Tensor:
            return classify(self.backbone, self.ladder, prompts, alone, [rung] * len(prompts))

        return Seen(torch.stack([at(stop) for stop in self.stops], dim=1), at(Rung()))

    def close(self, seen: Seen) -> torch.Tensor:
        """(B,) rows that are near a threshold anywhere."""
        near = torch.zeros(len(seen), dtype=torch.bool)
        for i, least in enumerate(self.contract.thresholds):
            own = torch.tensor(self.contract.weights[i])
            trusts = trust(seen.stops[:, : i + 1], own, torch.tensor(self.contract.biases[i]))
            near |= (trusts - least).abs() < CLOSE
        return near


def samples(base_url: str, name: str, label: str = "") -> dict[str, float]:
    """Values of a server's metric by one of its labels, added up over the others."""
    page = httpx.get(f"{base_url}/metrics", timeout=30).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == name:
                key = sample.labels.get(label, "")
                found[key] = found.get(key, 0.0) + sample.value
    return found


def check_contract(
    engine: RecordingEngine,
    promised: Promised,
    read: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits.softmax(-1),
    tolerance: float = 1e-4,
    batches: Sequence[tuple[int, int]] = ((0, 1), (2, 48)),
) -> None:
    """Every request leaves where the reference does, with its answer; some ask for the exact.

    ``batches``: seed and requests of each.
    """
    engine.planner.fix((Rung(sure=True),))
    places: set[int] = set()
    for seed, count in batches:
        prompts = random_prompts(seed, count)
        salts = ["exact" if i % 7 == 3 else f"tenant-{i % 2}" for i in range(count)]
        engine.planner.counts.clear()
        probs, _, _ = engine.answers(prompts, salts)
        seen = promised.seen(prompts)
        left = walk(promised.contract, seen)
        exact = torch.tensor([salt == "exact" for salt in salts])
        expected = torch.where(exact[:, None], seen.own, left.answers)
        sure = ~promised.close(seen) | exact
        assert sure.float().mean() > 0.9
        difference = (probs - read(expected)).abs().amax(-1)[sure].max().item()
        assert difference <= tolerance, (seed, count)
        names = [*map(str, promised.stops), "alone"]
        counted = [engine.planner.counts["contract", name] for name in names]
        assert sum(counted) == int((~exact).sum())
        if sure.all():
            places_left = torch.bincount(left.place[~exact], minlength=len(names)).tolist()
            assert counted == places_left
        places |= set(left.place[~exact].tolist())
    everywhere = set(range(len(promised.stops) + 1))
    assert places == everywhere, "rows no longer leave everywhere"


def check_shadows(engine: RecordingEngine, promised: Promised) -> None:
    """All are shadows: answered exactly, and compared with where they would have left."""
    engine.planner.fix((Rung(sure=True),))
    prompts = random_prompts(2, 64)
    engine.planner.counts.clear()
    probs, _, _ = engine.answers(prompts)
    seen = promised.seen(prompts)
    torch.testing.assert_close(probs, seen.own.softmax(-1), rtol=0, atol=1e-4)
    left = walk(promised.contract, seen)
    stayed = left.place == len(promised.stops)
    same = left.answers.argmax(-1) == seen.own.argmax(-1)
    counts = engine.planner.counts
    near = int(promised.close(seen).sum())
    assert abs(counts["shadow", "same"] - int((same & ~stayed).sum())) <= near
    assert abs(counts["shadow", "other"] - int((~same & ~stayed).sum())) <= near
    assert counts["shadow", "other"] > 3, "or it could not be told from never comparing"
    assert counts["requests", "alone"] == 64
    assert abs(counts["contract", "alone"] - int(stayed.sum())) <= near
