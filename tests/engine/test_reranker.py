"""A language model that answers yes or no, trained as a reranker and asked by ``/score``."""

import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import revmux, save_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.prompts import render
from revmux_vllm.reference import classify
from revmux_vllm.rungs import Rung
from revmux_vllm.training.data import LabelledText
from revmux_vllm.training.features import tokenize

TEMPLATE = (
    "w3 {{ messages[0]['content'] }} w4 "
    "{% for m in messages if m['role'] == 'document' %}{{ m['content'] }}{% endfor %} w5"
)
NO, YES = "w8", "w7"
QUERY = "w20 w21"
DOCUMENTS = ["w30 w31 w32", "w40", "w7 w50 w51"]


def pairs(path: Path, count: int, seed: int) -> Path:
    rng = random.Random(seed)
    lines = ["label\ttext_a\ttext_b"]
    for i in range(count):
        first, second = (
            " ".join(f"w{rng.randrange(10, 300)}" for _ in range(rng.randint(2, 8)))
            for _ in range(2)
        )
        lines.append(f"{i % 2}\t{first}\t{second}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reranker")
    save_backbone("qwen3", root / "backbone", language_model=True)
    (root / "score.jinja").write_text(TEMPLATE)
    result = revmux(
        f"train --backbone {root / 'backbone'} --train {pairs(root / 'train.tsv', 160, 0)} "
        f"--eval {pairs(root / 'dev.tsv', 32, 1)} --output {root / 'out'} --epochs 1 --augment 0 "
        f"--label-words {NO},{YES} --score-template {root / 'score.jinja'} --prefill-layers 1 "
        "--rungs mux:2,merge:2 --batch-size 16 --adapter-hidden-size 24"
    )
    assert result.exit_code == 0, result.output
    return root / "out"


def test_the_checkpoint_has_one_output_and_its_template(folder: Path) -> None:
    config, values = checkpoint.read_config(folder)
    assert config.score_template == TEMPLATE
    assert config.pairs
    assert values["id2label"] == {"0": YES}
    assert checkpoint.read_report(folder)["classes"] == [NO, YES]


def test_a_long_document_is_cut_and_not_the_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = LabelledText([(QUERY, " ".join(f"w{i}" for i in range(100, 140)))], [1])
    (ids,) = tokenize(tokenizer, rows, 16, TEMPLATE)["input_ids"]
    text = tokenizer.decode(ids)
    assert len(ids) == 16
    assert text.startswith(f"w3 {QUERY} w4 w100")
    assert text.endswith("w110 w5")


def test_scores_are_the_probability_of_yes(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "backbone").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.convert_tokens_to_ids(word) for word in (NO, YES)]
    texts = [render(TEMPLATE, QUERY, document) for document in DOCUMENTS]
    assert texts[1] == f"w3 {QUERY} w4 w40 w5"
    with torch.no_grad():
        logits = [model(**tokenizer(t, return_tensors="pt")).logits[0, -1, words] for t in texts]
    expected = [one.softmax(-1)[1].item() for one in logits]

    ladder = checkpoint.load_adapters(folder)
    backbone = load_backbone(checkpoint.backbone_folder(folder), 1, (NO, YES))
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    groups = [(i,) for i in range(len(ids))]
    logits_merged = classify(backbone, ladder, ids, groups, [Rung(2)] * len(ids))
    merged = logits_merged.softmax(-1)[:, 1].tolist()
    assert max(abs(a - b) for a, b in zip(expected, merged, strict=True)) > 1e-3

    always = ("--additional-config", '{"revmux": {"policy": "fixed:merge:2"}}')
    extra = ("--served-model-name", "yes", "--enforce-eager", "--dtype", "float32", *always)
    with LocalServer(str(folder), extra_args=extra) as server:
        server.wait_ready(300)

        def ask(path: str, **body: Any) -> Any:
            url, body = f"{server.base_url}{path}", {"model": "yes"} | body
            return httpx.post(url, json=body, timeout=60).raise_for_status().json()

        exact = {"cache_salt": "exact"}
        scored = ask("/score", text_1=QUERY, text_2=DOCUMENTS, **exact)["data"]
        at_rung = ask("/score", text_1=QUERY, text_2=DOCUMENTS)["data"]
        ranked = ask("/rerank", query=QUERY, documents=DOCUMENTS, **exact)["results"]
        told = ask("/classify", input=texts, **exact)["data"]
    scores = [row["score"] for row in scored]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 1e-3
    assert [row["score"] for row in at_rung] == pytest.approx(merged, abs=1e-4)
    order = sorted(range(len(DOCUMENTS)), key=lambda i: -expected[i])
    assert [row["index"] for row in ranked] == order
    assert [row["probs"] for row in told] == [pytest.approx([score], abs=1e-5) for score in scores]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "expected two words, no and yes in this order, beside --score-template"),
        ("--label-words w8,w7,w9", "--label-words w8,w7,w9: expected two words, no and yes"),
        ("--label-words w8,w7 --text-columns text_b", "--score-template: the rows are single"),
        ("--label-words yes,no", "--label-words yes,no: expected no before yes"),
        (
            "--label-words w8,w7 TEMPLATE={{query}}_{{document}}",
            "what it makes has not the query's",
        ),
        ("--label-words w8,w7 TEMPLATE={{messages}}_{{bos_token}}", "bos_token is not known here"),
        ("--label-words w8,w7 --max-tokens 4", "template and query 'w"),
    ],
)
def test_mistakes_are_named(change: str, message: str, folder: Path, tmp_path: Path) -> None:
    root = folder.parent
    options, _, template = change.partition("TEMPLATE=")
    (tmp_path / "score.jinja").write_text(template or TEMPLATE)
    result = revmux(
        f"train --backbone {root / 'backbone'} --train {root / 'train.tsv'} --output "
        f"{tmp_path / 'out'} --score-template {tmp_path / 'score.jinja'} --prefill-layers 1 "
        f"--rungs merge:2 {options}"
    )
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
