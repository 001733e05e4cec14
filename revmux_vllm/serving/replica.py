"""One engine under Ray Serve: vLLM's routes behind ``answer``, its health, its statistics."""

import asyncio
import json
import logging
import os
import time
from contextlib import AsyncExitStack
from logging.handlers import MemoryHandler
from typing import Any

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.api_server import key_headers, parse_arguments, running_app
from revmux_vllm.engine.environment import set_for_good
from revmux_vllm.planning.options import read_options
from revmux_vllm.serving.asgi import call
from revmux_vllm.serving.autoscaling import LOAD
from revmux_vllm.serving.messages import Headers, HttpRequest, HttpResponse, Work
from revmux_vllm.serving.stats import ReplicaStats, StatsReader, engine_numbers

WATCH_S, PROGRESS_S = 0.5, 5.0
STALLED_S = 120.0
"""An engine that has had work for so long without a step that answers is taken for dead."""
DEAD_ENGINE = 70
"""Exit status of a replica whose engine has died, or hangs."""

logger = logging.getLogger("ray.serve")


class EngineDied(RuntimeError):
    """The engine ended while it had the request; another replica may answer it."""


class EngineReplica:
    """The engine and its API server, in one replica.

    Args:
        model, served_name: as ``locate`` gives them.
        vllm_args: options of ``vllm serve``.
        threads: that the engine computes with on CPUs.
    """

    async def __init__(  # type: ignore[misc]
        self, model: str, served_name: str, vllm_args: list[str], threads: int
    ) -> None:
        _compute_with(threads)
        _keep_serve_log()
        args = parse_arguments(model, served_name, vllm_args)
        self._stack = AsyncExitStack()
        self._engine, self._app = await self._stack.enter_async_context(running_app(args))
        horizon_s = _horizon_s(self._engine)
        self._chars = 0
        self._under_way = 0
        # One for each of those who look, because a rate is since the last look.
        self._for_routers, self._for_autoscaler = StatsReader(horizon_s), StatsReader(horizon_s)
        name = self._engine.model_config.served_model_name
        await self._warm_up(name, key_headers(args))
        watches = (self._leave_when_it_dies(), self._leave_when_it_hangs())
        self._watches = [asyncio.create_task(watch) for watch in watches]

    async def answer(self, work: Work, request: HttpRequest) -> HttpResponse:
        """vLLM's answer.

        Raises:
            EngineDied: if there will be none.
        """
        self._under_way += 1
        self._chars += work.chars
        try:
            response = await call(self._app, request)
        except Exception as error:
            if self._engine.errored:
                raise EngineDied(repr(error)) from None
            raise
        finally:
            self._under_way -= 1
        if response.status >= 500 and self._engine.errored:
            raise EngineDied(response.body.decode(errors="replace"))
        return response

    async def metrics(self) -> tuple[str, str]:
        """Name of the replica, and its ``/metrics``."""
        from ray import serve

        request = HttpRequest("GET", "/metrics", b"", (), b"")
        page = await call(self._app, request)
        if page.status == 307:  # the mounted page stands at /metrics/
            page = await call(self._app, HttpRequest("GET", "/metrics/", b"", (), b""))
        return serve.get_replica_context().replica_id.unique_id, page.body.decode()

    async def check_health(self) -> None:
        """Serve's: raise if the engine is dead."""
        await self._engine.check_health()

    async def record_routing_stats(self) -> dict[str, float]:
        """For routers; see ``ReplicaStats``."""
        return self._look(self._for_routers).to_dict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For the autoscaler; see ``ReplicaStats``."""
        return {LOAD: self._look(self._for_autoscaler).load}

    async def __del__(self) -> None:
        """Serve's: the last thing that a leaving replica does."""
        for watch in self._watches:
            watch.cancel()
        await self._stack.aclose()

    def _look(self, reader: StatsReader) -> ReplicaStats:
        return reader.look(self._chars, is_idle=not self._under_way)

    async def _warm_up(self, name: str, key: Headers) -> None:
        """Two small requests: what steps cost is known from then on."""
        body = json.dumps({"model": name, "input": "hello"}).encode()
        headers = ((b"content-type", b"application/json"), *key)
        request = HttpRequest("POST", "/classify", b"", headers, body)
        for _ in range(2):
            response = await self.answer(Work(chars=5), request)
            if response.status != 200:
                logger.warning("the first request was refused: %s", response.body.decode())

    async def _leave_when_it_dies(self) -> None:
        """End the process with its engine: Ray notices that at once, and starts another."""
        while not self._engine.errored:
            await asyncio.sleep(WATCH_S)
        logger.error("the engine has died, so this replica leaves")
        await asyncio.sleep(WATCH_S)  # for the answers that say so
        os._exit(DEAD_ENGINE)

    async def _leave_when_it_hangs(self) -> None:
        """End the process when no step answers anything for ``STALLED_S``.

        A request of many texts may take long, so what counts is what the engine's steps answer;
        ``/health`` is answered by a hanging one too.
        """
        answered, since = -1.0, 0.0
        while True:
            now, number = time.monotonic(), engine_numbers()["answered"]
            if number != answered or not self._under_way:
                answered, since = number, now
            elif now - since > STALLED_S:
                logger.error(
                    "the engine hangs: no step for %.0f s; this replica leaves", now - since
                )
                os._exit(DEAD_ENGINE)
            await asyncio.sleep(PROGRESS_S)


def _keep_serve_log() -> None:
    """vLLM's ``logging.config.dictConfig`` closes every handler that there is, Serve's too.

    Then the replica's log is lost, and Serve, which asks for the name of its file at some time in
    the start, takes the replica for failed (``'NoneType' object has no attribute 'baseFilename'``).
    """
    for handler in logger.handlers:
        if isinstance(handler, MemoryHandler):
            handler.close = handler.flush  # type: ignore[method-assign]


def _compute_with(threads: int) -> None:
    """On CPUs vLLM would bind every engine of a machine to the same cores."""
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        set_for_good("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    set_for_good("OMP_NUM_THREADS", str(max(1, threads)))


def _horizon_s(engine: Any) -> float:
    config = RevMuxConfig.from_dict(engine.model_config.hf_config.revmux)
    return read_options(engine.vllm_config.additional_config, config).target_ms / 1000
