"""Where the requests of vLLM's routes have their texts. Plain Python."""

import json
from dataclasses import dataclass
from typing import Any

MAX_TEXTS = 2048
"""Of one request, unless told otherwise: as many as OpenAI takes in one request for embeddings."""

CHARS_PER_TOKEN = 4
"""Of prompts that come as token ids; texts are counted in characters."""

MESSAGES = "messages"
TEXTS = (
    *("input", MESSAGES, "text_1", "text_2", "data_1", "data_2"),
    *("queries", "documents", "items", "query"),
)
PAIRS = (
    *(("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")),
    ("query", "documents"),
)
"""Of which the first may be one text and the second many."""


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    Attributes:
        lengths: characters of every text that is read; a query is read with each document.
        answers: how many it asks for.
        salt: its ``cache_salt``.
    """

    lengths: tuple[int, ...] = ()
    answers: int = 0
    salt: str | None = None


def read_body(body: bytes) -> Asked:
    """What a request's body asks: nothing where it is no request, which is for vLLM to say.

    Reads ``input`` (``/classify``, ``/pooling``), ``messages``, and pairs under all their names.
    """
    try:
        values = json.loads(body)
        if not isinstance(values, dict):
            return Asked()
        by_name = {name: _lengths(values.get(name)) for name in TEXTS}
    except (ValueError, RecursionError):  # no JSON, or JSON nested deeper than any request is
        return Asked()
    lengths = [length for texts in by_name.values() for length in texts]
    for one, many in PAIRS:
        times = len(by_name[many]) - 1
        if len(by_name[one]) == 1 and times > 0:
            lengths += by_name[one] * times
    answers = max(
        min(len(texts), 1) if name == MESSAGES else len(texts) for name, texts in by_name.items()
    )
    salt = values.get("cache_salt")
    return Asked(tuple(lengths), answers, salt if isinstance(salt, str) else None)


def too_many(asked: Asked, most: int, option: str) -> str | None:
    """What is to be said to who asks for more than ``most`` answers at once; None: nothing."""
    if asked.answers <= most:
        return None
    return (
        f"{asked.answers:,} texts in one request, at most {most:,} are taken, or others would wait "
        f"behind it: send them in several requests (the server's {option} sets how many)"
    )


def _lengths(value: Any) -> list[int]:
    if isinstance(value, str):
        return [len(value)]
    if isinstance(value, dict):
        return [sum(sum(_lengths(part)) for part in value.values())]
    if not isinstance(value, list):
        return []
    if value and all(isinstance(item, int) for item in value):
        return [CHARS_PER_TOKEN * len(value)]
    return [length for item in value for length in _lengths(item)]
