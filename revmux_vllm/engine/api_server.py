"""vLLM's own API server without its listening socket: the engine, and its ASGI application.

What ``vllm serve`` does between reading its options and opening its port
(vllm/entrypoints/launchers/api_server/entry.py, 0.32), so that requests and answers are the same.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from revmux_vllm.engine.environment import check_plugins
from revmux_vllm.errors import UserError


def parse_arguments(model: str, served_name: str, vllm_args: list[str]) -> Any:
    """The options of ``vllm serve`` as it parses them.

    Raises:
        UserError: in vLLM's words.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:
            raise UserError("`vllm_args`", message)

    from revmux_vllm.engine.guard import warn_of_open_routes

    check_plugins()
    words = ["--model", model, *vllm_args]
    if not any(word.replace("_", "-").startswith("--served-model-name") for word in vllm_args):
        words += ["--served-model-name", served_name]
    try:
        args = make_arg_parser(Parser()).parse_args(words)
        validate_parsed_serve_args(args)
    except UserError:
        raise
    except ValueError as error:
        raise UserError("`vllm_args`", str(error)) from error
    warn_of_open_routes(vllm_args)
    return args


def key_headers(args: Any) -> tuple[tuple[bytes, bytes], ...]:
    """What a request of our own must bring where a key guards the routes."""
    keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
    return tuple((b"authorization", f"Bearer {key}".encode()) for key in keys[:1])


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
