"""Parts of a replica that need no engine."""

import asyncio
import logging
import logging.config
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from revmux_vllm.serving.asgi import call
from revmux_vllm.serving.messages import HttpRequest
from revmux_vllm.serving.replica import _keep_serve_log


def test_serves_log_outlives_vllms_configuration(tmp_path: Path) -> None:
    file = logging.FileHandler(tmp_path / "serve.log")
    buffer = MemoryHandler(capacity=1, target=file)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(buffer)
    try:
        _keep_serve_log()
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
        assert buffer.target is file
        logger.error("still here")
        buffer.flush()
        assert "still here" in (tmp_path / "serve.log").read_text()
    finally:
        logger.removeHandler(buffer)
        file.close()


def test_a_request_through_an_application_is_as_over_http() -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = scope["path"].encode() + b"?" + scope["query_string"] + message["body"]
        await send({"type": "http.response.start", "status": 201, "headers": scope["headers"]})
        await send({"type": "http.response.body", "body": body[:4], "more_body": True})
        await send({"type": "http.response.body", "body": body[4:]})

    request = HttpRequest("POST", "/a/b", b"c=d", ((b"x", b"y"),), b"body")
    answer = asyncio.run(call(echo, request))
    assert (answer.status, answer.headers, answer.body) == (201, ((b"x", b"y"),), b"/a/b?c=dbody")
