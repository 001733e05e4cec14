"""A request through an ASGI application in this process, as it would be over HTTP."""

import asyncio
from typing import Any

from revmux_vllm.serving.messages import HttpRequest, HttpResponse


async def call(app: Any, request: HttpRequest) -> HttpResponse:
    """One request through an ASGI application; cancelling it is a client that hangs up."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": None,
        "server": None,
    }
    received = False
    status, headers = 500, list[tuple[bytes, bytes]]()
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        nonlocal received
        if received:
            await asyncio.Future()  # nobody hangs up here: then the whole call is cancelled
        received = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], message["headers"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return HttpResponse(status, tuple((k, v) for k, v in headers), b"".join(parts))
