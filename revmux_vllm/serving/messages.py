"""What travels between the front and the replicas, and how much work it is. Plain Python."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

CHARS_PER_TOKEN = 4
"""Of prompts that come as token ids; texts are counted in characters."""

TEXTS = (
    *("input", "messages", "text_1", "text_2", "data_1", "data_2"),
    *("queries", "documents", "items", "query"),
)
"""Where vLLM's requests have their texts."""
PAIRS = (
    *(("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")),
    ("query", "documents"),
)
"""Of which the first may be one text and the second many."""

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class HttpRequest:
    """One request as it came; header names in lower case."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class HttpResponse:
    """One answer as it leaves."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Work:
    """How much a request is, and with whom it may share composites.

    Attributes:
        chars: characters of all its texts: a measure that needs no tokenizer. Replicas know how
            many of their tokens it takes (``ReplicaStats``).
        length_class: texts of one class differ by less than a factor of two.
        domain: its isolation domain, vLLM's ``cache_salt``.
    """

    chars: int = 1
    length_class: int = 1
    domain: str | None = None

    @property
    def kind(self) -> str | int:
        """Requests of one kind are partners: of one domain, and without one of one length."""
        return self.length_class if self.domain is None else self.domain


def measure(body: bytes) -> Work:
    """The work that a request's body asks for; the least there is where it asks for none.

    Reads ``input`` (``/classify``, ``/pooling``), pairs under any of vLLM's names, and
    ``cache_salt``. Bad requests are measured too, because it is the engine that refuses them.
    """
    try:
        values = json.loads(body)
        if not isinstance(values, dict):
            return Work()
        lengths = [length for key in TEXTS for length in _lengths(values.get(key))]
        for one, many in PAIRS:  # a single query is read with every document
            query, times = _lengths(values.get(one)), len(_lengths(values.get(many))) - 1
            if len(query) == 1 and times > 0:
                lengths += query * times
    except (ValueError, RecursionError):  # no JSON, or JSON nested deeper than any request is
        return Work()
    if not lengths:
        return Work()
    salt = values.get("cache_salt")
    typical = max(1, round(statistics.median(lengths)))
    return Work(
        chars=max(1, sum(lengths)),
        length_class=typical.bit_length(),
        domain=salt if isinstance(salt, str) else None,
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


def error_response(status: int, kind: str, message: str) -> HttpResponse:
    """An error of the front's own, in the shape of vLLM's."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    return HttpResponse(status, ((b"content-type", b"application/json"),), body)
