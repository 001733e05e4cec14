"""A cross-encoder over HTTP: pairs, one label, and the endpoints that vLLM has for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import make_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from word_tokenizers import save_pair_tokenizer

from revmux_vllm.bench.local_server import LocalServer

KEY = "of-this-test"
QUERY = "w7 w8 w9"
DOCUMENTS = ["w10 w11", "w12", "w13 w14 w15 w16", "w17 w7"]


@pytest.fixture(
    scope="module",
    params=["bert", pytest.param("deberta-v2-rich", marks=pytest.mark.slow)],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_checkpoint(
        tmp_path_factory.mktemp("pairs"),
        family=request.param,
        rungs="mux:4,merge:2",
        num_labels=1,
        pairs=True,
    )
    save_pair_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    extra = ("--served-model-name", "pairs", "--enforce-eager", "--dtype", "float32")
    # The exact answer for every request, so that transformers' own is the one to expect.
    options = ("--additional-config", '{"revmux": {"rungs": []}}')
    guard = ("--api-key", KEY, "--middleware", "revmux_vllm.engine.guard.Guard")
    with LocalServer(str(folder), extra_args=(*extra, *options, *guard)) as server:
        server.wait_ready(300)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.base_url, timeout=60, headers=headers) as client:
            yield client
        assert "answer without it" not in server.log_path.read_text()


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """Transformers' own answers, token types and all."""
    model = AutoModelForSequenceClassification.from_pretrained(folder.parent / "backbone").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [
            model(**tokenizer(QUERY, document, return_tensors="pt")).logits
            for document in DOCUMENTS
        ]
        untold = model(tokenizer(QUERY, DOCUMENTS[0], return_tensors="pt")["input_ids"]).logits
    assert abs(logits[0] - untold) > 1e-2, "the token types no longer matter"
    return torch.cat(logits).sigmoid().flatten().tolist()


def ask(client: httpx.Client, path: str, **body: object) -> httpx.Response:
    return client.post(path, json={"model": "pairs", **body})


def test_score(client: httpx.Client, expected: list[float]) -> None:
    response = ask(client, "/score", text_1=QUERY, text_2=DOCUMENTS).raise_for_status()
    scores = [row["score"] for row in response.json()["data"]]
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"truncate_prompt_tokens": 8, "truncation_side": "left"}])
def test_a_separator_in_a_text_ends_nothing(
    options: dict[str, Any], client: httpx.Client, folder: Path
) -> None:
    """A document could choose by it which of its words are taken for the query's."""
    query, document = "w7 [SEP] w8 w9", "w10 [SEP] w11 w12"
    model = AutoModelForSequenceClassification.from_pretrained(folder.parent / "backbone").eval()
    encoded = AutoTokenizer.from_pretrained(folder)(query, document, return_tensors="pt")
    last = options.get("truncate_prompt_tokens", 0)
    with torch.no_grad():
        logits = model(**{name: rows[:, -last:] for name, rows in encoded.items()}).logits
    body = {"text_1": query, "text_2": [document, document]} | options
    rows = ask(client, "/score", **body).raise_for_status().json()["data"]
    assert [row["score"] for row in rows] == [pytest.approx(logits.sigmoid().item(), abs=1e-5)] * 2


def test_rerank(client: httpx.Client, expected: list[float]) -> None:
    response = ask(client, "/rerank", query=QUERY, documents=DOCUMENTS).raise_for_status()
    ranked = response.json()["results"]
    order = sorted(range(len(DOCUMENTS)), key=lambda i: -expected[i])
    assert [row["index"] for row in ranked] == order
    assert [row["relevance_score"] for row in ranked] == pytest.approx(
        sorted(expected, reverse=True), abs=1e-5
    )


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
def test_a_pair_as_one_text_with_the_separator(
    path: str, client: httpx.Client, expected: list[float]
) -> None:
    texts = [f"{QUERY} [SEP] {document}" for document in DOCUMENTS]
    rows = ask(client, path, input=texts).raise_for_status().json()["data"]
    answers = [row["probs" if path == "/classify" else "data"] for row in rows]
    assert answers == [pytest.approx([score], abs=1e-5) for score in expected]


@pytest.mark.parametrize("path", ["/classify", "/score", "/rerank", "/pooling", "/v1/models"])
def test_the_key_guards_every_route_that_answers(path: str, client: httpx.Client) -> None:
    with httpx.Client(base_url=client.base_url) as stranger:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": KEY}):
            asked = stranger.post(path, json={"model": "pairs"}, headers=headers)
            assert asked.status_code == 401
        assert stranger.get("/health").is_success


@pytest.mark.parametrize(
    "texts",
    [
        {"input": ["w7"] * 100_000},
        {"text_1": QUERY, "text_2": ["w7"] * 100_000},
        {"query": QUERY, "documents": ["w7"] * 100_000},
    ],
)
def test_a_request_of_too_many_texts_is_refused(
    texts: dict[str, Any], client: httpx.Client, expected: list[float]
) -> None:
    path = "/classify" if "input" in texts else "/score" if "text_1" in texts else "/rerank"
    response = ask(client, path, **texts)
    assert response.status_code == 413
    assert "100,000 texts in one request, at most 2,048" in response.json()["error"]["message"]
    assert "REVMUX_MAX_TEXTS" in response.json()["error"]["message"]
    test_score(client, expected)


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_what_is_nested_too_deep_harms_nobody(
    opened: str, closed: str, client: httpx.Client, expected: list[float]
) -> None:
    deep = opened * 100_000 + "1" + closed * 100_000
    body = f'{{"model": "pairs", "input": {deep}}}'
    for content in (body, body[:-1]):
        headers = {"Content-Type": "application/json"}
        response = client.post("/classify", content=content, headers=headers)
        assert 400 <= response.status_code < 500, response.text
    test_score(client, expected)


def test_what_cannot_be_answered_is_refused(client: httpx.Client) -> None:
    too_long = ask(client, "/classify", input=" ".join(["w9"] * 600))
    assert too_long.status_code == 400
    assert "maximum context length" in too_long.text or "longer than" in too_long.text
    assert ask(client, "/score", text_1=QUERY).status_code in (400, 422)
    assert ask(client, "/classify", input=[[QUERY, "w10"]]).status_code in (400, 422)
    assert ask(client, "/classify", input=QUERY).status_code == 200, "it still answers"
