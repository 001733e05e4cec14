"""What travels between the front and the replicas, and how much work it is. Plain Python."""

import json
import statistics
from dataclasses import dataclass

from revmux_vllm.protocol import Asked

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


def measure(asked: Asked) -> Work:
    """The work that a request asks for; the least there is where it asks for none.

    Bad requests are measured too, because it is the engine that refuses them.
    """
    if not asked.lengths:
        return Work()
    typical = max(1, round(statistics.median(asked.lengths)))
    return Work(
        chars=max(1, sum(asked.lengths)),
        length_class=typical.bit_length(),
        domain=asked.salt,
    )


def error_response(status: int, kind: str, message: str) -> HttpResponse:
    """An error of the front's own, in the shape of vLLM's."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    return HttpResponse(status, ((b"content-type", b"application/json"),), body)
