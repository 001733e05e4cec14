"""The same backbone with RevMUX and without, both behind HTTP and under the same load.

Requests arrive by themselves, at multiples of plain vLLM's capacity, first at one server and then
at the other; the one that was second is first at the next load.
"""

from collections.abc import Sequence
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn

from revmux_vllm.bench.client import ClientError, Load
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import mixed_layer_limit
from revmux_vllm.bench.servers import PLAIN, check_alive, progress_bar, server_pair, wait_for
from revmux_vllm.bench.settings import BURSTINESS, OnlineSettings
from revmux_vllm.bench.summary import SIDES, summarise
from revmux_vllm.bench.target import BURST_S, Target
from revmux_vllm.bench.workload import Workload


def run(settings: OnlineSettings, workload: Workload, console: Console) -> dict[str, Any]:
    """Start both servers, measure, and stop them whatever happens.

    Returns:
        What ``revmux bench online --json`` prints.

    Raises:
        ServerError: if a server ends or is not ready in time.
        ClientError: if a request for the measurement itself fails, or the client does.
    """
    pair = server_pair(settings.model, settings.vllm_args, settings.additional_config)
    with pair as servers:
        wait_for(servers, console)
        try:
            return measure(settings, workload, servers, console)
        except httpx.HTTPError as error:
            check_alive(servers)
            raise ClientError(f"a server did not answer: {error!r}") from error


def measure(
    settings: OnlineSettings, workload: Workload, servers: Sequence[LocalServer], console: Console
) -> dict[str, Any]:
    """Capacity, then every load at both servers."""
    served = settings.model, PLAIN
    targets = {
        name: Target(name, server, model, workload.texts, lambda: check_alive(servers))
        for name, server, model in zip(SIDES, servers, served, strict=True)
    }
    shape = workload.model.config.prefill_layers, workload.model.num_layers
    points = []
    with progress_bar(console, BarColumn(), MofNCompleteColumn()) as progress:
        task = progress.add_task("plain: capacity", total=1 + 2 * len(settings.loads))
        targets["revmux"].warm_up()
        capacity = targets["plain"].capacity(min(BURST_S, settings.seconds))
        progress.advance(task)
        for number, multiple in enumerate(settings.loads):
            rate = multiple * capacity
            load = Load(
                rate,
                max(1, round(rate * settings.seconds)),
                BURSTINESS[settings.arrivals],
                seed=settings.seed,
            )
            point: dict[str, Any] = {"load": multiple, "offered": rate}
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                progress.update(task, description=f"{name}: {rate:.1f} requests/s")
                point[name] = targets[name].under(load)
                progress.advance(task)
            counts = point["revmux"]["requests_by_rung"]
            some = point["revmux"]["mean_ms"] is not None
            point["layer_limit"] = mixed_layer_limit(counts, *shape) if some else None
            points.append(point)
    return {
        "model": settings.model,
        "seconds": settings.seconds,
        "arrivals": settings.arrivals,
        "lengths": str(workload.lengths),
        "shared_prefix": settings.shared_prefix,
        "seed": settings.seed,
        "server_args": settings.vllm_args,
        "additional_config": settings.additional_config,
        "prefill_layers": shape[0],
        "layers": shape[1],
        "plain_capacity": capacity,
        "points": points,
        "sustained": summarise(points, settings.slo_ms),
    }
