"""The HTTP side: measures a request, hands it to a replica, and to another one if that dies.

Classification is idempotent, so a request whose replica died is asked again. The client sees one
answer, or, if replica after replica dies of the same request, one error: such a request must not
end them all.
"""

import logging

from ray.exceptions import RayActorError
from ray.serve import metrics
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from revmux_vllm.protocol import read_body, too_many
from revmux_vllm.serving.messages import HttpRequest, HttpResponse, error_response, measure
from revmux_vllm.serving.replica import EngineDied
from revmux_vllm.serving.stats import merge_pages

PAGE_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS_S = 10.0
SKIPPED = (b"content-length", b"connection", b"transfer-encoding")
"""Headers of an answer that belong to the connection it came over."""

logger = logging.getLogger("ray.serve")


class Front:
    """The ingress deployment.

    Args:
        engines: the replicas.
        retries: how many of them may die of one request.
        max_texts: of one request.
    """

    def __init__(self, engines: DeploymentHandle, retries: int, max_texts: int) -> None:
        # gRPC in place of actor calls, which take twice the CPU time of a small request.
        self._engines = engines.options(_by_reference=False)
        self._retries = retries
        self._max_texts = max_texts
        self._retried = metrics.Counter(
            "revmux_front_retries", "Requests asked again because their replica died.", ("reason",)
        )

    async def __call__(self, request: Request) -> Response:
        """One HTTP request."""
        # Without the route prefix of the Ray Serve application: vLLM's routes know none.
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "")) or "/"
        if path.rstrip("/") == "/metrics" and request.method == "GET":
            return Response(await self._metrics(), media_type=PAGE_TYPE)
        asked = HttpRequest(
            method=request.method,
            path=path,
            query=request.scope["query_string"],
            headers=tuple((k, v) for k, v in request.headers.raw),
            body=await request.body(),
        )
        answer = await self._answer(asked)
        response = Response(answer.body, status_code=answer.status)
        response.raw_headers += [(k, v) for k, v in answer.headers if k not in SKIPPED]
        return response

    async def _answer(self, request: HttpRequest) -> HttpResponse:
        asked = read_body(request.body)
        if problem := too_many(asked, self._max_texts, "`max_texts`"):
            return error_response(413, "ContentTooLarge", problem)
        work = measure(asked)
        for died in range(self._retries + 1):
            try:
                return await self._engines.answer.remote(work, request)
            except BackPressureError as error:
                return error_response(429, "TooManyRequests", error.message)
            except DeploymentUnavailableError as error:
                return error_response(503, "ServiceUnavailable", str(error))
            except (RayActorError, EngineDied) as error:
                kind = type(error).__name__
                self._retried.inc(tags={"reason": kind})
                logger.warning("a replica died with a request (%s), time %d", kind, died + 1)
        return error_response(
            503,
            "ServiceUnavailable",
            f"{self._retries + 1} engines died while they had this request; it is not asked again "
            "(`retries` of the application sets how often it is)",
        )

    async def _metrics(self) -> bytes:
        try:
            pages = await self._engines.broadcast("metrics").results_async(
                timeout_s=METRICS_S, return_exceptions=True
            )
        except DeploymentUnavailableError:  # Ray's word for no engine at the moment, too
            pages = []
        return merge_pages(dict(page for page in pages if not isinstance(page, Exception)))
