"""The API key for every route, where vLLM's own guards those that begin with ``/v1`` and the like.

``/classify``, ``/score``, ``/rerank`` and ``/pooling`` are none of them.
"""

import multiprocessing
import os
from collections.abc import Awaitable, Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger

OPEN = ("/health", "/ping", "/metrics", "/version", "/load")
"""What a load balancer and a monitor ask, without a key."""
MIDDLEWARE = "revmux_vllm.engine.guard.Guard"

logger = init_logger("vllm.revmux")


class Guard:
    """``vllm serve --api-key KEY --middleware revmux_vllm.engine.guard.Guard``.

    The keys are vLLM's own: of ``--api-key``, else of ``VLLM_API_KEY``. Without one nothing is
    guarded, as in vLLM.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._keys: AuthenticationMiddleware | None = None

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answers 401, or passes the request on."""
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return self.app(scope, receive, send)
        if self._keys is None:
            given = scope["app"].state.args.api_key or [envs.VLLM_API_KEY]
            self._keys = AuthenticationMiddleware(self.app, [key for key in given if key])
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_open = path in OPEN or not self._keys.api_tokens
        if is_open or self._keys.verify_token(Headers(scope=scope)):
            return self.app(scope, receive, send)
        response = JSONResponse(content={"error": "Unauthorized"}, status_code=401)
        return response(scope, receive, send)


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
