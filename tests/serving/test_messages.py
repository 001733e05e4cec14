"""How much work a request is, by its body."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revmux_vllm.protocol import Asked, read_body
from revmux_vllm.serving.messages import Work, error_response, measure


def of(**values: Any) -> Work:
    return measure(asked(**values))


def asked(**values: Any) -> Asked:
    return read_body(json.dumps({"model": "m", **values}).encode())


@pytest.mark.parametrize(
    ("values", "chars", "length_class"),
    [
        ({"input": "abcd"}, 4, 3),
        ({"input": ["ab", "cd", "abcdefgh"]}, 12, 2),
        ({"input": [1, 2, 3]}, 12, 4),
        ({"input": [[1, 2], [3, 4, 5]]}, 20, 4),
        ({"text_1": "abc", "text_2": ["abc", "abc"]}, 12, 2),
        ({"text_1": ["abc", "abc"], "text_2": ["abc", "abc"]}, 12, 2),
        ({"query": "ab" * 50, "documents": ["abc"] * 10}, 10 * 103, 6),
        ({"queries": "abc", "documents": ["abcd"]}, 7, 3),
        ({"messages": [{"role": "user", "content": "hello"}]}, 9, 4),
        ({"input": ""}, 1, 1),
        ({"input": []}, 1, 1),
        ({"input": 5}, 1, 1),
        ({}, 1, 1),
    ],
)
def test_work(values: dict[str, Any], chars: int, length_class: int) -> None:
    assert of(**values) == Work(chars, length_class)


def test_every_text_of_every_request_of_vllm_counts() -> None:
    """What a request must bring is what it is about."""
    from vllm.entrypoints.pooling.classify import protocol as classify
    from vllm.entrypoints.pooling.pooling import protocol as pooling
    from vllm.entrypoints.pooling.scoring import protocol as scoring

    kinds = [
        *(classify.ClassificationCompletionRequest, classify.ClassificationChatRequest),
        *(pooling.PoolingCompletionRequest, pooling.PoolingChatRequest, scoring.RerankRequest),
        *get_args(scoring.ScoreRequest),
    ]
    assert len(kinds) == 9
    for kind in kinds:
        needed = [name for name, own in kind.model_fields.items() if own.is_required()]
        assert needed
        for name in needed:
            assert of(**{name: "a" * 4000}).chars == 4000, f"{kind.__name__}.{name}"


@pytest.mark.parametrize("opened", ["[", '{"input":'])
def test_what_is_nested_too_deep_is_left_to_the_engine(opened: str) -> None:
    assert read_body(b'{"input":' + opened.encode() * 100_000) == Asked()
    closed = {"[": "]", '{"input":': "}"}[opened]
    deep = opened * 900 + "1" + closed * 900
    assert measure(read_body(b'{"input":' + deep.encode() + b"}")).chars >= 1


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ({"input": ["a", "b", "c"]}, 3),
        ({"input": [[1, 2], [3]]}, 2),
        ({"input": [1, 2, 3]}, 1),
        ({"text_1": "a", "text_2": ["b", "c"]}, 2),
        ({"text_1": ["a", "b"], "text_2": ["c", "d"]}, 2),
        ({"query": "a", "documents": ["b"] * 5}, 5),
        ({"messages": [{"role": "user", "content": "a"}] * 3}, 1),
        ({}, 0),
    ],
)
def test_as_many_answers_as_vllm_will_give(values: dict[str, Any], answers: int) -> None:
    assert asked(**values).answers == answers


def test_the_domain_is_the_cache_salt() -> None:
    assert of(input="ab", cache_salt="tenant").kind == "tenant"
    assert of(input="ab").kind == 2
    assert of(input="ab", cache_salt=7).domain is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
)


@settings(deadline=None)
@given(st.binary() | st.dictionaries(st.sampled_from(["input", "documents"]), json_values))
def test_any_body_is_measured(body: Any) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert measure(read_body(raw)).chars >= 1


def test_errors_look_like_vllms() -> None:
    response = error_response(429, "TooManyRequests", "busy")
    assert json.loads(response.body)["error"] == {
        "message": "busy", "type": "TooManyRequests", "param": None, "code": 429,
    }  # fmt: skip
