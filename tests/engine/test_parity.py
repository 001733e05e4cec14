"""The heart of the suite: the engine's answers are the reference's, given the same plan.

Random weights far from any start make each answer depend strongly on its company, so a mistake in
grouping, stream, position, page or slot cannot hide.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ByCrowd, RecordingEngine, make_tiny_checkpoint, random_prompts
from contracts import UNDER_CONTRACT, Promised, check_contract, check_shadows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vllm.model_executor.layers.attention import Attention
from word_tokenizers import VOCAB_SIZE, save_pair_tokenizer, word_tokenizer

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.engine.graphs import UpperGraphs
from revmux_vllm.engine.plain import PlainEngine
from revmux_vllm.reference import classify
from revmux_vllm.rungs import Rung, parse_rungs

BATCHES = [(0, 1), (1, 5), (2, 64), (3, 31), (4, 64), (5, 2)]  # seed, requests
FLOAT32_TOLERANCE = 1e-4

Reference = Callable[..., torch.Tensor]


def reference_of(folder: Path) -> Reference:
    ladder = checkpoint.load_adapters(folder)
    source = checkpoint.backbone_folder(folder)
    backbone = load_backbone(source, 1, ladder.config.label_words)
    return lambda *prompts_and_plan: classify(backbone, ladder, *prompts_and_plan).softmax(-1)


def sharing_prompts(seed: int, count: int) -> list[list[int]]:
    """Texts of which most begin with one of three prefixes, some of them with a part of one."""
    rng = random.Random(seed)
    prefixes = [random.Random(i).choices(range(1, VOCAB_SIZE), k=230) for i in range(3)]
    prompts = []
    for _ in range(count):
        prefix = rng.choice(prefixes)
        shared = prefix[: rng.choice([0, 20, 32, 70, 96, 100, 192, 200, 230])]
        own = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.choice([0, 1, 2, 9, 40, 70]))]
        prompts.append([*shared, *own] or [5])
    return prompts


def check(
    engine: RecordingEngine,
    reference: Reference,
    kind: str,
    tolerance: float = FLOAT32_TOLERANCE,
    make: Callable[[int, int], list[list[int]]] = random_prompts,
) -> None:
    """Engine and reference agree where the rungs ``kind`` and the backbone alone may run.

    An empty ``kind``: the backbone alone.
    """
    seen: set[str] = set()
    wanted = kind.split(",") if kind else []
    engine.planner.policy = ByCrowd(parse_rungs(wanted))
    for seed, count in BATCHES:
        prompts = make(seed, count)
        probs, groups, rungs = engine.answers(prompts)
        seen |= set(map(str, rungs))
        assert sorted(i for group in groups for i in group) == list(range(count))
        difference = (probs - reference(prompts, groups, rungs)).abs().max().item()
        assert difference <= tolerance, (seed, count, rungs)
    assert seen == {"alone", *wanted}, "the batches no longer cover every rung"


MUX, MERGE = "mux:2,mux:4,mux:8", "merge:2"
BOTH = "merge:3,merge:3+mux:2,merge:3+mux:4"  # a step of three requests merges without a partner
MIXED = "merge:2,mux:4,mux:8"  # what has no partner merges, beside composites in the same step

EXIT = "mux:2,exit"
STOPS = "exit@3,mux:2@2,mux:4@3,mux:8"  # in one step: rows leave after every layer
MERGED_STOPS = "merge:2@2,merge:3+mux:2@3"
ALL = f"exit@2,{MUX},{MERGE},{BOTH},{STOPS.removesuffix(',mux:8')},{MERGED_STOPS},exit"

MIXED_WINDOWS = ["qwen2-windows", "qwen3-windows", "ministral", "gemma3_text"]
"""Of 24 rows in every other layer, and texts that are longer."""
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", *MIXED_WINDOWS]
FAMILIES = [
    *DECODERS,
    *("bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert", "modernbert-mean"),
]
WITH_PREFIXES = [family for family in DECODERS if family != "mistral"]
"""Kept in the cache; every layer of that one has a window."""
PADDED = ["deberta-v2", "deberta-v2-rich"]
"""Layers of transformers, which nothing compiles; T5, which answers with words, is another."""
NOT_VLLMS = ["qwen2-windows", "qwen3-windows", "electra", "distilbert", *PADDED]
"""Backbones that vLLM has no classifier for."""
SLOW_RELATIVES = [
    *("mistral", "qwen2", "gemma", *MIXED_WINDOWS[:-1]),
    *("roberta", "xlm-roberta", "electra", "distilbert", "modernbert"),
]


SLOW_BERT = pytest.param("bert", marks=pytest.mark.slow)
SLOW_ENCODERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("xlm-roberta", "electra", "distilbert")
]
SLOW_RICH = pytest.param("deberta-v2-rich", marks=pytest.mark.slow)
SLOW_GEMMAS = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "gemma3_text")]
SLOW_TIED = pytest.param("llama-tied", marks=pytest.mark.slow)


def all_but(*slow: str) -> list[Any]:
    """Every family; ``slow`` ones, which differ in a name or two from one that runs, are marked."""
    marks = {family: [pytest.mark.slow] for family in slow}
    return [pytest.param(family, marks=marks.get(family, [])) for family in FAMILIES]


@pytest.mark.parametrize("family", [*all_but(*SLOW_RELATIVES), "deberta-v2", SLOW_RICH])
def test_float32(
    family: str,
    tmp_path: Path,
    make_engine: Callable[..., RecordingEngine],
    plain_vllm: Callable[[Path], PlainEngine],
) -> None:
    folder = parity_checkpoint(tmp_path, family)
    promised = Promised(folder)
    engine, reference = make_engine(folder, **UNDER_CONTRACT), reference_of(folder)
    for kind in (MUX, BOTH, MIXED, EXIT, STOPS, MERGED_STOPS):
        check(engine, reference, kind)
    check_contract(engine, promised)
    if family in MIXED_WINDOWS:  # others share prefixes in test_compiled
        check(engine, reference, MERGE, make=sharing_prompts)
        assert engine.cached_tokens
        (windows,) = engine.llm.apply_model(windows_of_backends)
        assert sorted(map(str, windows)) == ["{24}"] * 3 + ["{None}"] * 2
    if family in NOT_VLLMS:
        check(engine, reference, "")
    else:
        (tmp_path / "plain").mkdir()
        check_alone(engine, plain_vllm(Path(checkpoint.plain_backbone(folder, tmp_path / "plain"))))
    if family in DECODERS:  # vLLM's CPU encoder takes no padding
        # Upper rows padded as for CUDA graphs, with NaN in them: nobody may notice.
        engine.llm.apply_model(pad_upper_rows)
        check(engine, reference, MIXED)
        check_contract(engine, promised)
    engine.llm.apply_model(shadow_everything)
    check_shadows(engine, promised)


def windows_of_backends(model: Any) -> list[set[int | None]]:
    """In the worker: of the layers that share metadata."""
    found: dict[str, set[int | None]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            name = module.attn_backend.__name__
            found.setdefault(name, set()).add(module.sliding_window)
    return list(found.values())


def parity_checkpoint(root: Path, family: str, **options: Any) -> Path:
    """With every kind of rung; of windows of both kinds some are between the same two stops."""
    num_layers = 5 if family in MIXED_WINDOWS else 4
    return make_tiny_checkpoint(root, family=family, num_layers=num_layers, rungs=ALL, **options)


def check_alone(engine: RecordingEngine, plain: PlainEngine) -> None:
    """The same weights in vLLM's own classifier, the same batches."""
    engine.planner.policy = ByCrowd(())
    for seed, count in BATCHES:
        prompts = random_prompts(seed, count)
        probs, _, rungs = engine.answers(prompts)
        assert set(rungs) == {Rung()}
        expected = torch.tensor(plain.probabilities(prompts))
        torch.testing.assert_close(probs, expected, rtol=0, atol=1e-6)


def shadow_everything(model: Any) -> None:
    """In the worker."""
    model.shadow_rate = 1.0


def pad_upper_rows(model: Any) -> None:
    """In the worker: as if the upper layers had been captured at these sizes."""
    model.upper_graphs = UpperGraphs(8192, model.hidden_size)
    model.upper_graphs.sizes = [64, 256, 1024, 4096, 8192]
    model.upper_graphs.rows.fill_(torch.nan)


@pytest.mark.parametrize(
    "family",  # the others differ in their layers, which vLLM compiles by itself
    all_but(*FAMILIES[1:]),
)
def test_compiled(family: str, tmp_path: Path, make_engine: Callable[..., RecordingEngine]) -> None:
    folder = parity_checkpoint(tmp_path, family)
    promised, reference = Promised(folder), reference_of(folder)
    engine = make_engine(folder, enforce_eager=False, **UNDER_CONTRACT)
    for kind in (MUX, BOTH, MIXED, EXIT, STOPS, MERGED_STOPS):
        check(engine, reference, kind)
    if family in DECODERS:  # most of them behind a prefix
        for kind in (MUX, MERGE):
            check(engine, reference, kind, make=sharing_prompts)
        assert bool(engine.cached_tokens) is (family in WITH_PREFIXES)
    check_contract(engine, promised)


@pytest.mark.parametrize(
    "family",
    ["t5", pytest.param("t5-v1.1", marks=pytest.mark.slow), "llama", SLOW_TIED, *SLOW_GEMMAS],
)
def test_label_words(
    family: str, tmp_path: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    """A language model answers with words; T5 is transformers' own beside width 1."""
    folder = make_tiny_checkpoint(
        tmp_path,
        family=family,
        language_model=True,
        rungs=ALL,
        label_words=("w8", "w7", "w311"),
    )
    own_head = "lm_head.weight" in load_file(folder / "model.safetensors")
    assert own_head is (family in ("llama", "t5-v1.1")), "both kinds of LM head are to be tested"
    promised, reference = Promised(folder), reference_of(folder)
    engine = make_engine(folder, **UNDER_CONTRACT)
    for kind in (BOTH, MIXED, EXIT, STOPS, ""):
        check(engine, reference, kind)
    check_contract(engine, promised)


def test_one_label(tmp_path: Path, make_engine: Callable[..., RecordingEngine]) -> None:
    """A cross-encoder's answer is the sigmoid of its logit."""
    folder = make_tiny_checkpoint(tmp_path, family="bert", num_labels=1, rungs=ALL)
    promised, both_classes = Promised(folder), reference_of(folder)
    engine = make_engine(folder, **UNDER_CONTRACT)
    for kind in (MUX, MIXED, EXIT):
        check(engine, lambda *args: both_classes(*args)[:, 1:], kind)
    check_contract(engine, promised, lambda logits: logits.softmax(-1)[:, 1:])


def test_a_bundled_backbone_in_shards(
    tmp_path: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    """Its index does not list the adapters, and vLLM reads what the index lists."""
    ladder = checkpoint.load_adapters(make_tiny_checkpoint(tmp_path))
    backbone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone")
    sharded = tmp_path / "sharded"
    backbone.save_pretrained(sharded, max_shard_size="200KB")
    word_tokenizer().save_pretrained(sharded)
    folder = tmp_path / "bundle"
    checkpoint.save(folder, ladder, sharded, "# shards\n", bundle_backbone=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    check(make_engine(folder), reference_of(folder), MUX)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["electra", "distilbert"])
def test_token_types_count_where_the_backbone_has_them(
    family: str, tmp_path: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    """By the first separator, or as `/score` brings them, as in transformers; DistilBERT has none,
    whatever its tokenizer brings."""
    folder = make_tiny_checkpoint(
        tmp_path, family=family, rungs="mux:2", num_labels=1, pairs=True, bundle_backbone=False
    )
    save_pair_tokenizer(folder)
    pair = ("w7 w8 w9", "w10 w11 [SEP] w12")
    encoded = AutoTokenizer.from_pretrained(folder)(*pair, return_tensors="pt")
    assert encoded["token_type_ids"].sum() == 5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone").eval()
    with torch.no_grad():
        expected = model(**encoded).logits.sigmoid().item()
        untold = model(encoded["input_ids"]).logits.sigmoid().item()
    assert (abs(expected - untold) > 1e-3) is (family == "electra")
    engine = make_engine(folder)
    probs, *_ = engine.answers(encoded["input_ids"].tolist())
    assert probs.item() == pytest.approx(expected, abs=1e-5)
    (scored,) = engine.llm.score(*pair)
    assert scored.outputs.score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", SLOW_BERT, "t5"])
def test_merged_answers_do_not_depend_on_company(
    family: str, tmp_path: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    words: dict[str, Any] = {"label_words": ("w8", "w7")} if family == "t5" else {}
    engine = make_engine(
        make_tiny_checkpoint(tmp_path, family=family, rungs="merge:2,merge:3", **words)
    )
    engine.planner.policy = ByCrowd((Rung(2),))
    prompts = random_prompts(8, 48)
    together, _, rungs = engine.answers(prompts)
    assert set(map(str, rungs)) == {"merge:2"}
    # Bit for bit, also beside other tenants' texts, as long as the step has the same shape.
    others = [[(token + 7) % 300 + 1 for token in prompt] for prompt in prompts]
    mixed = [prompts[i] if i % 2 else others[i] for i in range(48)]
    beside, _, _ = engine.answers(mixed, salts=[f"tenant-{i % 3}" for i in range(48)])
    assert torch.equal(beside[1::2], together[1::2])
    assert not torch.equal(beside[::2], together[::2])
    one = torch.cat([engine.answers(prompts[i : i + 2])[0] for i in range(0, 48, 2)])
    assert (together - one).abs().max() < 1e-6  # kernels of another size round elsewhere


@pytest.fixture(scope="module")
def tiny_merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("merging"), rungs="merge:2,merge:3")


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    return reference_of(tiny_checkpoint)


@pytest.mark.parametrize("family", ["llama", SLOW_BERT, *SLOW_ENCODERS, *SLOW_GEMMAS])
def test_tensor_parallel(
    family: str,
    tmp_path: Path,
    make_engine: Callable[..., RecordingEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers: each has a part of the backbone, and all of the adapters."""
    # Left to itself vLLM gives every worker a NUMA node, and most machines have one.
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    folder = parity_checkpoint(tmp_path, family, hidden_size=128)
    promised, reference = Promised(folder), reference_of(folder)
    engine = make_engine(folder, tensor_parallel_size=2, **UNDER_CONTRACT)
    for kind in (MUX, BOTH):  # partial sums of two workers round elsewhere
        check(engine, reference, kind, 2 * FLOAT32_TOLERANCE)
    if family != "bert":
        for kind in (MUX, MERGE):
            check(engine, reference, kind, 2 * FLOAT32_TOLERANCE, sharing_prompts)
        assert bool(engine.cached_tokens) is (family in WITH_PREFIXES)
    check_contract(engine, promised, tolerance=2 * FLOAT32_TOLERANCE)


@pytest.mark.parametrize("adapter_type", ["ora", "vanilla"])
def test_the_papers_other_adapters(
    adapter_type: str, tmp_path: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    # The backbone is named here, as `revmux train` does unless it is told otherwise.
    folder = make_tiny_checkpoint(
        tmp_path, adapter_type=adapter_type, skip=False, bundle_backbone=False
    )
    check(make_engine(folder), reference_of(folder), MUX)


def test_merging_changes_answers(tiny_merging: Path) -> None:
    reference = reference_of(tiny_merging)
    # Of a short one most tokens keep rows of their own.
    prompts = [prompt for prompt in random_prompts(7, 64) if len(prompt) > 8]
    alone = [(i,) for i in range(len(prompts))]
    a, b, c = (reference(prompts, alone, [Rung(n)] * len(prompts)) for n in (1, 2, 3))
    for one, other in ((a, b), (a, c), (b, c)):
        assert (one - other).abs().amax(-1).median() > 100 * FLOAT32_TOLERANCE


def test_company_changes_answers(reference: Reference) -> None:
    """Without this the parity test could not fail on a wrong grouping."""
    prompts = random_prompts(7, 8)
    prompts.sort(key=len, reverse=True)
    a = reference(prompts, [(0, 1), (2, 3), (4, 5), (6, 7)])
    b = reference(prompts, [(0, 2), (1, 3), (4, 6), (5, 7)])
    assert (a - b).abs().amax(-1).median() > 100 * FLOAT32_TOLERANCE


def test_tenants_never_share_a_composite(
    tiny_checkpoint: Path, make_engine: Callable[..., RecordingEngine]
) -> None:
    tenants = list("ababca")
    _, groups, _ = make_engine(tiny_checkpoint).answers([[5, 6, 7]] * 6, tenants)
    assert sorted(len(group) for group in groups) == [1, 1, 2, 2]
    assert all(len({tenants[member] for member in group}) == 1 for group in groups)
