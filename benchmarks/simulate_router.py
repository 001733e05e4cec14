"""Routers compared on 1 to 1,000 simulated replicas: width, latency and throughput.

Discrete events, simulated time. What decides is the code that serves: ``choose`` picks the replica,
``StepPlanner`` fills the steps of every engine, ``LayerCosts`` says how long a step takes. What
stands between them, in ``router_simulation/``, is imitated:

* **Replicas** run every step as it was planned. Their costs are given, not fitted.
* **Fronts** have a view of their own each; a request comes to one at random. *Pack-aware* ones keep
  the books of ``serving/router.py``: exact about what they sent, and Ray's cache for the rest: one
  more at each send, one less at each answer, the replica's own number when it accepts a request,
  and nothing after ten seconds. What replicas can answer is known exactly.
* **The alternatives** are favoured: *power-of-two* sees the true number under way at its two
  replicas, which Ray's router estimates. *Round-robin* counts by itself in every front.
* **Traffic** is the same for all routers: gamma gaps of shape 0.2, at ``--peak`` times the mean
  rate for 10 s of every 30; log-normal lengths (median 33 tokens, sigma 0.8, at most 512), four
  characters a token. Its load is a share of what all replicas could answer in full steps at the
  widest rung without padding, so that 0.6 and a peak of 1.5 come close to what they really can.
* **Time** is measured in whole periods of 30 s after a warm-up of 10; large clusters get fewer.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from router_simulation.report import make_table, plot
from router_simulation.routers import ROUTERS
from router_simulation.setting import (
    FILL_MS,
    NUM_TENANTS,
    PEAK_S,
    PERIOD_S,
    WARM_UP_S,
    Calibration,
    Setting,
)
from router_simulation.simulation import measure

from revmux_vllm.errors import UserError
from revmux_vllm.terminal import AsJson, check_plot, make_console, mendable_errors

REPLICAS_PER_FRONT = 50


def periods_s(requests_per_s: float, seconds: float, requests: int) -> float:
    """Traffic to measure: whole periods, at least one."""
    wanted = min(seconds, requests / requests_per_s - WARM_UP_S)
    return PERIOD_S * max(1, int(wanted / PERIOD_S))


def make_settings(base: Setting, options: dict[str, Any]) -> list[Setting]:
    """A point for every number of replicas and router."""
    settings = []
    for replicas in options["replicas"]:
        fronts = options["fronts"] or max(1, replicas // REPLICAS_PER_FRONT)
        point = replace(base, replicas=replicas, fronts=fronts)
        seconds = periods_s(point.requests_per_s, options["seconds"], options["requests"])
        settings += [replace(point, router=name, seconds=seconds) for name in options["routers"]]
    return settings


def run(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """All points, with a bar on standard error."""
    rows = []
    with Progress(console=make_console(stderr=True)) as progress:
        total = sum(setting.requests_per_s * setting.traffic_s for setting in settings)
        task = progress.add_task("simulating", total=total)
        for setting in settings:
            progress.update(task, description=f"{setting.replicas:,} replicas, {setting.router}")
            advance = partial(progress.advance, task, setting.requests_per_s)
            rows.append(measure(setting, advance))
        progress.update(task, completed=total)
    return rows


def read_numbers(text: str) -> list[int]:
    """Numbers of replicas. Raises UserError for what is none."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isdigit() and int(word)):
            raise UserError("`replicas`", f"expected positive integers, found {word!r}")
    return [int(word) for word in words]


def read_routers(text: str) -> list[str]:
    """Their names. Raises UserError for an unknown one."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in ROUTERS:
            raise UserError("`routers`", f"expected some of {', '.join(ROUTERS)}, found {word!r}")
    return words


# Long because every option is a parameter, with its help beside it.
def main(
    replicas: Annotated[str, typer.Option(help="Numbers of them.")] = "1,2,4,10,30,100,300,1000",
    routers: Annotated[str, typer.Option(help="Which of them.")] = ",".join(ROUTERS),
    load: Annotated[
        float, typer.Option(min=0.01, help="Of the capacity at the widest rung.")
    ] = 0.6,
    peak: Annotated[
        float, typer.Option(min=1, max=PERIOD_S / PEAK_S, help="Rate of the peaks over the mean.")
    ] = 1.5,
    shape: Annotated[float, typer.Option(min=0.01, help="Of the gamma gaps; 1: Poisson.")] = 0.2,
    fill_ms: Annotated[float, typer.Option(help="As the application's; its default.")] = FILL_MS,
    fronts: Annotated[
        int, typer.Option(help=f"0: one for every {REPLICAS_PER_FRONT} replicas.")
    ] = 0,
    tenants: Annotated[
        float, typer.Option(min=0, max=1, help=f"Share with one of {NUM_TENANTS} domains.")
    ] = 0.0,
    delay_ms: Annotated[float, typer.Option(help="One way between front and replica.")] = 3.0,
    seconds: Annotated[float, typer.Option(help="Measured at most, simulated.")] = 600.0,
    requests: Annotated[
        int, typer.Option(help=f"A point at most, where {PERIOD_S:g} s are not more.")
    ] = 100_000,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    calibrate: Annotated[Path | None, typer.Option(help="JSON: another engine.")] = None,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON there too.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a picture.")] = None,
) -> None:
    """Every router on every number of replicas under the same traffic."""
    with mendable_errors():
        check_plot(picture)
        calibration = Calibration.read(calibrate) if calibrate else Calibration()
        options = {
            "replicas": read_numbers(replicas),
            "routers": read_routers(routers),
            "fronts": fronts,
            "seconds": seconds,
            "requests": requests,
        }
        base = Setting(
            calibration=calibration,
            load=load,
            peak=peak,
            shape=shape,
            fill_s=fill_ms / 1000,
            tenants=tenants,
            delay_s=delay_ms / 1000,
            seed=seed,
        )
        points = run(make_settings(base, options))
        given = asdict(base) | options
        report = {"setting": given, "tokens_per_s": calibration.tokens_per_s, "points": points}
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=2) + "\n")
        if picture:
            plot(report, picture)
    if as_json:
        print(json.dumps(report))
    else:
        make_console().print(make_table(points))


if __name__ == "__main__":
    typer.run(main)
