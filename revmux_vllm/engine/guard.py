"""The API key for every route, and a limit to one request.

vLLM's own key guards routes that begin with ``/v1`` and the like; ``/classify``, ``/score``,
``/rerank`` and ``/pooling`` are none of them. And it takes any number of texts in one request: its
server then does nothing else for as long as it takes to hand them to the engine, and later ones
wait behind them.
"""

import multiprocessing
import os
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger

from revmux_vllm.protocol import MAX_TEXTS, read_body, too_many

OPEN = ("/health", "/ping", "/metrics", "/version", "/load")
"""What a load balancer and a monitor ask, without a key."""
MIDDLEWARE = "revmux_vllm.engine.guard.Guard"
LIMIT = "REVMUX_MAX_TEXTS"
"""Environment variable: texts that one request may have."""

logger = init_logger("vllm.revmux")


class Guard:
    """``vllm serve --api-key KEY --middleware revmux_vllm.engine.guard.Guard``.

    The keys are vLLM's own: of ``--api-key``, else of ``VLLM_API_KEY``. Without one everybody may
    ask, as in vLLM; the limit holds all the same.

    Args:
        app: what is behind it.

    Raises:
        ValueError: where ``LIMIT`` is no number of texts.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._keys: AuthenticationMiddleware | None = None
        given = os.environ.get(LIMIT, str(MAX_TEXTS))
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(f"{LIMIT}={given}: expected a number of texts, such as {MAX_TEXTS}")
        self._max_texts = int(given)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 or 413, or passes the request on."""
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return await self.app(scope, receive, send)
        if self._keys is None:
            given = scope["app"].state.args.api_key or [envs.VLLM_API_KEY]
            self._keys = AuthenticationMiddleware(self.app, [key for key in given if key])
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_open = path in OPEN or not self._keys.api_tokens
        if not is_open and not self._keys.verify_token(Headers(scope=scope)):
            response = JSONResponse(content={"error": "Unauthorized"}, status_code=401)
            return await response(scope, receive, send)
        if scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return None
        if problem := too_many(read_body(body), self._max_texts, LIMIT):
            error = {"message": problem, "type": "ContentTooLarge", "param": None, "code": 413}
            response = JSONResponse(content={"error": error}, status_code=413)
            return await response(scope, receive, send)
        return await self.app(scope, _again(body, receive), send)


def _again(body: bytes, receive: Receive) -> Receive:
    """``receive`` of a request whose body was read already."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def warn_of_open_routes(words: Sequence[str]) -> None:
    """Say once at start-up which routes a key does not guard.

    Args:
        words: options of ``vllm serve``.
    """
    has_key = bool(os.environ.get("VLLM_API_KEY")) or any(
        word.split("=")[0].replace("_", "-") == "--api-key" for word in words
    )
    is_first = multiprocessing.parent_process() is None
    if has_key and is_first and not any(MIDDLEWARE in word for word in words):
        logger.warning(
            "RevMUX: the API key guards /v1 alone, as in vLLM: /classify, /score, /rerank and "
            "/pooling answer without it. --middleware %s guards them too.",
            MIDDLEWARE,
        )
