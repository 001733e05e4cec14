"""vLLM's own API server without its listening socket: the engine, and its routes as one call.

What ``vllm serve`` does between reading its options and opening its port
(vllm/entrypoints/launchers/api_server/entry.py, 0.32), so that requests and answers are the same.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from revmux_vllm.serving.messages import HttpRequest, HttpResponse


def parse_arguments(model: str, served_name: str, vllm_args: list[str]) -> Any:
    """The options of ``vllm serve`` as it parses them.

    Raises:
        ValueError: in vLLM's words.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:
            raise ValueError(f"vllm_args: {message}")

    words = ["--model", model, *vllm_args]
    if not any(word.replace("_", "-").startswith("--served-model-name") for word in vllm_args):
        words += ["--served-model-name", served_name]
    args = make_arg_parser(Parser()).parse_args(words)
    validate_parsed_serve_args(args)
    return args


@asynccontextmanager
async def running_app(args: Any) -> AsyncIterator[tuple[Any, Any]]:
    """An engine and its ASGI application, ended with the block."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        async with app.router.lifespan_context(app):
            yield engine, app


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
