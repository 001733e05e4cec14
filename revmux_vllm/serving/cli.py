"""``revmux serve``: the Ray Serve application on a cluster of this machine, or on a running one."""

import os
import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revmux_vllm.errors import UserError, require, within
from revmux_vllm.serving.batch_cli import batch as batch
from revmux_vllm.terminal import as_flag, fail, make_console, mendable_errors, unwound_on_sigterm

if TYPE_CHECKING:
    from revmux_vllm.serving.options import ServeOptions

POLL_S = 2.0
DRAIN_OF_LOCAL_S = "3"


class DeploymentFailed(RuntimeError):
    """Ray Serve could not start the application, and why in its own words."""


# Long because its signature is the command's options, each with its help.
def serve(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, bundled name or hub id.")
    ] = "revmux-llama",
    replicas: Annotated[int, typer.Option(help="Engines; with --max-replicas the fewest.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most engines: switches autoscaling on.")
    ] = None,
    cpus_per_replica: Annotated[
        float, typer.Option(help="CPUs of one engine, and threads that it computes with on CPUs.")
    ] = 1.0,
    gpus_per_replica: Annotated[
        float | None, typer.Option(help="Default: what tensor parallelism takes, if there are any.")
    ] = None,
    fronts: Annotated[int, typer.Option(help="HTTP processes before the engines.")] = 2,
    router: Annotated[
        str, typer.Option(help="`pack-aware`, or Ray's own `power-of-two`.")
    ] = "pack-aware",
    vllm_args: Annotated[
        str, typer.Option(help="Options of `vllm serve` for every engine, in quotes.")
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, `auto` for this machine's. Default: a new one."),
    ] = None,
    environment: Annotated[
        bool,
        typer.Option("--environment", help="Only print what to `export` before `ray start`."),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE: any other of the application's; docs/ray.md lists them."),
    ] = None,
) -> None:
    """Several engines behind one address, by Ray Serve; the routes are those of `vllm serve`.

    Example: `revmux serve revmux-llama --replicas 2`. Ctrl-C ends it. On a cluster:
    `serve deploy examples/ray_serve.yaml`; `docs/ray.md` has more.
    """
    with mendable_errors():
        require("ray", extra="ray")
        if environment:
            from revmux_vllm.serving.application import cluster_environment

            for name, value in cluster_environment().items():
                print(f"export {name}={shlex.quote(value)}")
            return
        own = {
            "model": model,
            "replicas": replicas,
            "max_replicas": max_replicas,
            "cpus_per_replica": cpus_per_replica,
            "gpus_per_replica": gpus_per_replica,
            "fronts": fronts,
            "router": router,
            "vllm_args": vllm_args,
        }
        options = _read(own, option or [])
        try:
            _run(options, host, port, address)
        except DeploymentFailed as error:
            fail(str(error))


def _read(own: dict[str, Any], others: list[str]) -> "ServeOptions":
    """The application's options: those that are the command's own, and KEY=VALUE.

    Raises:
        UserError: for each that is wrong, as it is typed.
    """
    from revmux_vllm.serving.options import ServeOptions, read_options

    def spell(key: str) -> str:
        if key == "model":
            return "MODEL"
        only_there = ServeOptions.model_fields.keys() - own.keys()
        return f"--option {key}" if key in only_there else as_flag(key)

    pairs = dict(_pair(text) for text in others)
    with within("", spell):
        return read_options(own | pairs)


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError("`option`", expected="KEY=VALUE", found=text)
    return key, value


def _run(options: "ServeOptions", host: str, port: int, address: str | None) -> None:
    """Deploy, say when it is ready, and stay until interrupted.

    Raises:
        UserError: if the options do not fit this machine or the cluster.
        DeploymentFailed: if the application does not start.
    """
    from revmux_vllm.serving.application import app, prepare_environment
    from revmux_vllm.serving.cluster import connect

    if address is None:
        # Nothing else stands before these fronts that would have to learn that they leave.
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", DRAIN_OF_LOCAL_S)
        prepare_environment()
    import ray
    from ray import serve

    console = make_console(stderr=True)
    if address is not None:
        connect(address, namespace="serve", logging_level="WARNING")
    with console.status(f"{options.model}: checking it and the options"):
        application = app(options)
    if address is None:
        connect(None, namespace="serve", logging_level="WARNING")
    try:
        with unwound_on_sigterm():  # in here, because Ray sets a handler that aborts
            _check_room(options, ray.cluster_resources())
            with console.status(f"starting {options.replicas} engines: minutes, the first time"):
                _deploy(application, host, port)
            url = f"http://{host}:{port}/classify"
            console.print(f"{options.model} answers at {url}", highlight=False)
            while True:
                time.sleep(POLL_S)
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(application: Any, host: str, port: int) -> None:
    """Returns when the engines answer.

    Raises:
        DeploymentFailed: for what Ray Serve raises, which has no type of its own for it.
    """
    from ray import serve

    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, blocking=False, _local_testing_mode=False)
    except (RuntimeError, TimeoutError) as error:
        raise DeploymentFailed(str(error)) from error


def _check_room(options: "ServeOptions", resources: dict[str, float]) -> None:
    """Raise UserError where Ray would wait for CPUs that never come."""
    needed, there = options.replicas * options.cpus_per_replica, resources.get("CPU", 0.0)
    if needed > there:
        raise UserError(
            f"`replicas` {options.replicas}",
            f"{needed:g} CPUs are needed at `cpus_per_replica` {options.cpus_per_replica:g}, and "
            f"the cluster has {there:g}",
            cure="ask for less of either",
        )
