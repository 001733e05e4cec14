"""The engine's answers are the reference's under the same plan, and alone plain vLLM's.

Both engines answer the same prompts on the device; the plans that RevMUX's engine made are then
computed by ``revmux_vllm.reference`` in float32 on the CPU.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.engines import Recorder, model_facts
from gpu.results import FAIL, PASS, Outcome
from gpu.tiny import ALL_RUNGS, random_prompts, write_checkpoint
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.engine.plain import PlainEngine
from revmux_vllm.rungs import Rung, parse_rungs

CASES = (
    "mux:2,mux:4,mux:8",
    "merge:2,merge:2+mux:2",
    "merge:2,mux:4,mux:8",  # what has no partner merges, beside composites in the same step
    "merge:4",
    "exit",
)
"""What may run together; every fifth request asks for the backbone alone beside it."""
BATCHES = ((1, 5), (2, 64), (3, 31), (4, 2))  # seed, requests
EXACT = "exact"


@dataclass(frozen=True)
class Tolerance:
    """How far a probability may be off.

    Attributes:
        most: of any, from the reference under the same plan.
        mean: over all of a case.
        alone: of any, from plain vLLM, where every request runs alone.
        because: why so much.
    """

    most: float
    mean: float
    alone: float
    because: str


TOLERANCES = {
    ("cpu", "float32"): Tolerance(1e-4, 1e-5, 1e-5, "float32 sums in another order"),
    ("gpu", "float32"): Tolerance(
        2e-2, 2e-3, 5e-3, "Triton's attention multiplies float32 in TF32 (10 bits)"
    ),
    ("cpu", "bfloat16"): Tolerance(0.15, 2e-2, 5e-2, "7 bits; the reference is in float32"),
    ("gpu", "bfloat16"): Tolerance(0.15, 2e-2, 5e-2, "7 bits; the reference is in float32"),
}
"""By device and dtype. What wrong company does is measured beside every comparison."""


def compare(family: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run both engines over a tiny checkpoint; what differs, as ``judge`` and its like read it.

    Runs in a child of the kit.
    """
    with tempfile.TemporaryDirectory(prefix="revmux-parity-") as root:
        folder = write_checkpoint(Path(root), family)
        engine = InProcessEngine(folder, quiet=False, **options)
        try:
            recorder = Recorder(engine)
            found = _against_reference(engine, recorder, folder)
            engine.planner.fix(())
            alone = [_probabilities(engine, random_prompts(*batch)) for batch in BATCHES]
            facts = engine.llm.apply_model(model_facts)[0]
        finally:
            engine.close()
        plain = PlainEngine(Path(root) / "backbone", enable_prefix_caching=False, **options)
        try:
            theirs = [plain.probabilities(random_prompts(*batch)) for batch in BATCHES]
        finally:
            plain.close()
    return found | {"alone": _most(alone, theirs), **facts}


def _against_reference(engine: InProcessEngine, recorder: Recorder, folder: Path) -> dict[str, Any]:
    from revmux_vllm import checkpoint
    from revmux_vllm.backbones.loading import load_backbone
    from revmux_vllm.reference import classify

    ladder = checkpoint.load_adapters(folder)
    backbone = load_backbone(checkpoint.backbone_folder(folder), 1, None)

    def reference(*given: Any) -> Any:
        return classify(backbone, ladder, *given).softmax(-1)

    seen: set[str] = set()
    cases: dict[str, dict[str, float]] = {}
    most_rungs = 0
    for case in CASES:
        engine.planner.fix(parse_rungs(case.split(",")))
        differences, company = [], []
        for batch in BATCHES:
            prompts = random_prompts(*batch)
            probabilities, groups, rungs = _answers(engine, recorder, prompts)
            expected = reference(prompts, groups, rungs)
            others = reference(
                prompts, [(i,) for i in range(len(prompts))], [Rung()] * len(prompts)
            )
            differences.append((probabilities - expected).abs().flatten())
            company.append((expected - others).abs().flatten())
            seen |= set(map(str, rungs))
            most_rungs = max(most_rungs, *(len(set(plan.rungs)) for plan in recorder.plans))
        cases[case] = _summary(differences) | {"if_alone": _summary(company)["mean"]}
    return {"cases": cases, "rungs": sorted(seen), "most_rungs_in_a_step": most_rungs}


def _answers(
    engine: InProcessEngine, recorder: Recorder, prompts: list[list[int]]
) -> tuple[Any, list[tuple[int, ...]], list[Rung]]:
    """Probabilities (B, C), the groups that they were computed in, and these groups' rungs."""
    import torch

    recorder.plans.clear()
    salts = [EXACT if i % 5 == 4 else "all" for i in range(len(prompts))]
    outputs = engine.classify(prompts, salts=salts)
    index = {output.request_id: i for i, output in enumerate(outputs)}
    groups = [
        # The engine appends a suffix of its own to the ids it was given.
        tuple(index[member.rsplit("-", 1)[0]] for member in group)
        for plan in recorder.plans
        for group in plan.groups
    ]
    rungs = [rung for plan in recorder.plans for rung in plan.rungs]
    return torch.tensor([output.outputs.probs for output in outputs]), groups, rungs


def _probabilities(engine: InProcessEngine, prompts: list[list[int]]) -> list[list[float]]:
    return [output.outputs.probs for output in engine.classify(prompts)]


def _summary(differences: list[Any]) -> dict[str, float]:
    import torch

    all_of_them = torch.cat(differences)
    return {"most": all_of_them.max().item(), "mean": all_of_them.mean().item()}


def _most(ours: list[list[list[float]]], theirs: list[list[list[float]]]) -> float:
    import torch

    pairs = zip(ours, theirs, strict=True)
    return max((torch.tensor(a) - torch.tensor(b)).abs().max().item() for a, b in pairs)


def judge(found: dict[str, Any], tolerance: Tolerance) -> Outcome:
    """Whether the engine's answers are the reference's.

    A difference that is no number is too large. Rungs that no batch reached, and batches that no
    longer mix rungs in a step, fail too: they would have tested nothing.
    """
    cases = found["cases"]
    worst = max(cases, key=lambda case: _rank(cases[case]["most"]))
    mean = max((case["mean"] for case in cases.values()), key=_rank)
    attention = ", ".join(found["attention"])
    says = (
        f"{attention}: differs by at most {cases[worst]['most']:.1e} ({worst}), {mean:.1e} on "
        f"average; allowed {tolerance.most:g} and {tolerance.mean:g}; answers alone differ by "
        f"{min(case['if_alone'] for case in cases.values()):.1e} on average"
    )
    wanted = {str(Rung()), *map(str, ALL_RUNGS)}
    if missing := sorted(wanted - set(found["rungs"])):
        return Outcome(FAIL, f"no batch ran {', '.join(missing)}", found)
    if found["most_rungs_in_a_step"] < 3:
        return Outcome(FAIL, "no step mixed three rungs", found)
    right = all(
        case["most"] <= tolerance.most and case["mean"] <= tolerance.mean for case in cases.values()
    )
    return Outcome(PASS if right else FAIL, says, found)


def judge_alone(found: dict[str, Any], tolerance: Tolerance) -> Outcome:
    """Whether a request that runs alone gets plain vLLM's answer."""
    says = f"differs from plain vLLM by at most {found['alone']:.1e}; allowed {tolerance.alone:g}"
    return Outcome(PASS if found["alone"] <= tolerance.alone else FAIL, says)


def _rank(value: float) -> tuple[bool, float]:
    """By which NaN is the largest."""
    return value != value, value
