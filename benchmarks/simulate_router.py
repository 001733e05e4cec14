"""Routers compared on 1 to 1,000 simulated replicas: width, latency and throughput.

Discrete events, simulated time. What decides is the code that serves: ``choose`` picks the replica,
``ByLoad``, ``pack_rungs`` and ``first_of`` fill the steps of every engine, ``LayerCosts`` says how
long a step takes. What stands between them is imitated:

* **Replicas** plan a step as ``engine/scheduler.py`` does. Their costs are given, not fitted.
* **Fronts** have a view of their own each; a request comes to one at random. *Pack-aware* ones keep
  the books of ``serving/router.py``: exact about what they sent, and Ray's cache for the rest: one
  more at each send, one less at each answer, the replica's own number when it accepts a request,
  and nothing after ten seconds. What replicas can answer is known exactly.
* **The rivals** are favoured: *power-of-two* sees the true number under way at its two replicas,
  which Ray's router estimates. *Round-robin* counts by itself in every front.
* **Traffic** is the same for all routers: gamma gaps of shape 0.2, at ``--peak`` times the mean
  rate for 10 s of every 30; log-normal lengths (median 33 tokens, sigma 0.8, at most 512), four
  characters a token. Its load is a share of what all replicas could answer in full steps at the
  widest rung without padding, so that 0.6 and a peak of 1.5 come close to what they really can.
* **Time** is measured in whole periods of 30 s after a warm-up of 10; large clusters get fewer.

The engine by default is LLaMA, 12 layers, D=768, on one core, from docs/measurements.md (*Under
load*): 9.9 requests/s of 32 tokens in bursts, that is 317 tokens/s in steps of 2,048 tokens (vLLM's
budgets for a CPU server), and 142 ms for one such request at light load. So a step costs 40 ms, and
0.26 ms per layer and row. That the 40 ms are 2 per layer and 16 besides is a guess, and only their
sum matters here. At mux:4 it answers 2.27 times as much; measured were at least 2.25 over HTTP and
2.31 without.
"""

import heapq
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.costs import ArrivalRate, Backlog, LayerCosts
from revmux_vllm.engine.policy import make_policy, read_options
from revmux_vllm.merging import row_counts
from revmux_vllm.packing import Packed, first_of, pack_rungs
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.serving.choice import Load, MeanChars, choose
from revmux_vllm.serving.messages import CHARS_PER_TOKEN, Work
from revmux_vllm.serving.options import ServeOptions
from revmux_vllm.terminal import check_plot, make_console, mendable_errors

RATE_HORIZONS = 5  # of engine/scheduler.py, which cannot be imported without vLLM
CACHE_S = 10.0
"""Ray's RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S."""
MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 33, 0.8, 512
PERIOD_S, PEAK_S = 30.0, 10.0
WARM_UP_S = 10.0
NUM_TENANTS = 20
REPLICAS_PER_FRONT = 50
FILL_MS = float(ServeOptions.model_fields["fill_ms"].default)
STYLES = {"pack-aware": "o-", "power-of-two": "s--", "round-robin": "^:"}


@dataclass(frozen=True)
class Calibration:
    """What an engine is and what its steps cost: the keys of ``--calibrate FILE``."""

    layers: int = 12
    prefill_layers: int = 3
    rungs: tuple[str, ...] = ("mux:2", "mux:4")
    seconds_per_layer: float = 0.002
    seconds_per_layer_and_token: float = 0.00026
    overhead_s: float = 0.016
    max_tokens: int = 2048
    max_requests: int = 128

    def __post_init__(self) -> None:
        parse_rungs(self.rungs)
        for name, value in vars(self).items():
            if name != "rungs" and (not isinstance(value, int | float) or value < 0):
                raise ValueError(f"{name}: expected a number, none below 0, found {value!r}")

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Raises ValueError unless the file has these keys, all of them and no others."""
        values = json.loads(path.read_text())
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"--calibrate {path}: expected the keys {', '.join(sorted(names))}")
        return cls(**values | {"rungs": tuple(values["rungs"])})

    def costs(self) -> LayerCosts:
        """The line, given."""
        return GivenCosts(self)

    @property
    def tokens_per_s(self) -> float:
        """In full steps at the widest rung."""
        saving = max(rung.saving for rung in (Rung(), *parse_rungs(self.rungs)))
        return self.costs().tokens_per_s(saving, self.max_tokens)


class GivenCosts(LayerCosts):
    """``LayerCosts`` whose line is not fitted to a run."""

    known = True

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(calibration.prefill_layers, calibration.layers)
        self._line = calibration.seconds_per_layer, calibration.seconds_per_layer_and_token
        self.overhead_s = calibration.overhead_s

    def per_layer(self) -> tuple[float, float]:
        """As it was given."""
        return self._line


@dataclass(frozen=True)
class Setting:
    """One point of the comparison.

    Attributes:
        load: offered, over what all replicas can answer at the widest rung.
        peak: rate of the ``PEAK_S`` over the mean.
        tenants: share of requests with one of ``NUM_TENANTS`` domains.
        delay_s: one way between front and replica.
        seconds: of traffic that is measured, whole periods, after ``WARM_UP_S``.
    """

    calibration: Calibration = Calibration()
    replicas: int = 1
    router: str = "pack-aware"
    fronts: int = 1
    load: float = 0.6
    peak: float = 1.5
    shape: float = 0.2
    fill_s: float = FILL_MS / 1000
    tenants: float = 0.0
    delay_s: float = 0.003
    seconds: float = PERIOD_S
    seed: int = 0

    @property
    def requests_per_s(self) -> float:
        """Offered."""
        return self.load * self.replicas * self.calibration.tokens_per_s / mean_tokens()

    @property
    def traffic_s(self) -> float:
        """With the warm-up."""
        return WARM_UP_S + self.seconds


@dataclass(slots=True, eq=False)
class Request:
    """One request; ``at`` its front, ``received`` at its replica, seconds."""

    at: float
    tokens: int
    work: Work
    front: int
    replica: int = 0
    received: float = 0.0


@cache
def mean_tokens() -> float:
    """Of the lengths that ``Traffic`` draws."""
    rng = random.Random(0)
    return sum(draw_tokens(rng) for _ in range(100_000)) / 100_000


def draw_tokens(rng: random.Random) -> int:
    """The length of a text."""
    return max(1, min(MOST_TOKENS, round(rng.lognormvariate(math.log(MEDIAN_TOKENS), SIGMA))))


class Traffic:
    """Requests in the order of their arrival; the same for every router."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.end = setting.traffic_s
        self._rng = random.Random(setting.seed)
        self._at = 0.0
        self._rate = setting.requests_per_s

    def next(self) -> Request | None:
        """The next one, until the end."""
        setting, rng = self.setting, self._rng
        mean_gap = 1 / (self._rate * self._pace())
        self._at += rng.gammavariate(setting.shape, mean_gap / setting.shape)
        if self._at >= self.end:
            return None
        tokens = draw_tokens(rng)
        chars = CHARS_PER_TOKEN * tokens
        tenant = f"tenant-{rng.randrange(NUM_TENANTS)}" if rng.random() < setting.tenants else None
        work = Work(chars, chars.bit_length(), tenant)
        return Request(self._at, tokens, work, rng.randrange(setting.fronts))

    def _pace(self) -> float:
        peak = self.setting.peak
        lull = (PERIOD_S - peak * PEAK_S) / (PERIOD_S - PEAK_S)
        return peak if (self._at - WARM_UP_S) % PERIOD_S < PEAK_S else lull


class Engine:
    """A replica: ``RevMuxScheduler`` over a queue of its own, without vLLM."""

    def __init__(self, calibration: Calibration, costs: LayerCosts) -> None:
        config = RevMuxConfig(parse_rungs(calibration.rungs), calibration.prefill_layers)
        options = read_options({}, config)
        self.max_tokens, self.max_requests = calibration.max_tokens, calibration.max_requests
        self.costs = costs
        self.policy = make_policy(config, options, costs, self.max_tokens, self.max_requests)
        self.arrivals = ArrivalRate(RATE_HORIZONS * options.target_ms / 1000, 0.0)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._choice_at = -math.inf

    @property
    def under_way(self) -> int:
        """Requests received and not answered."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """One more waits."""
        self.arrivals.add(request.tokens)
        self.waiting.append(request)

    def start(self, now: float) -> tuple[list[Packed], float]:
        """Begin a step: its composites, and how long it will take."""
        window = self.waiting[: self.policy.window]
        rungs = self.policy.rungs(self._backlog(window, now))
        lengths = [request.tokens for request in window]
        began, self._choice_at = self._choice_at, now
        fresh = {i for i, request in enumerate(window) if request.received > began}
        composites = first_of(
            pack_rungs(lengths, rungs, [request.work.domain for request in window]),
            lengths,
            rungs,
            self.max_tokens,
            self.max_requests,
            fresh if self.policy.defers else frozenset(),
        )
        chosen = {i for _, group in composites for i in group}
        self.running = [window[i] for i in chosen]
        self.waiting = [r for i, r in enumerate(self.waiting) if i not in chosen]
        rows = sum(
            0 if rung.exit else row_counts(max(lengths[i] for i in group), rung.merge)
            for rung, group in composites
        )
        return composites, self.costs.seconds(sum(lengths[i] for i in chosen), rows)

    def _backlog(self, window: list[Request], now: float) -> Backlog:
        rate, number = self.arrivals.update(now), len(self.waiting)
        tokens = sum(request.tokens for request in window) / max(1, len(window))
        return Backlog(number, number * tokens, rate)


class Router:
    """A front's: chooses, and is told what becomes of its requests."""

    def choose(self, work: Work, now: float) -> int:
        """The replica for ``work``."""
        raise NotImplementedError

    def on_send(self, request: Request, now: float) -> None:
        """It was sent to its replica."""

    def on_accept(self, request: Request, number: int, now: float) -> None:
        """Its replica has it, and ``number`` with it."""

    def on_answer(self, request: Request, now: float) -> None:
        """It was answered."""


class RoundRobin(Router):
    """One after the other, from a random one on."""

    def __init__(self, num_replicas: int, rng: random.Random) -> None:
        self._next, self._num_replicas = rng.randrange(num_replicas), num_replicas

    def choose(self, work: Work, now: float) -> int:
        """The next one."""
        self._next = (self._next + 1) % self._num_replicas
        return self._next


class PowerOfTwo(Router):
    """The less busy of two at random.

    Args:
        under_way: the true numbers, those on their way to a replica among them.
    """

    def __init__(self, under_way: Sequence[int], rng: random.Random) -> None:
        self._under_way, self._rng = under_way, rng

    def choose(self, work: Work, now: float) -> int:
        """Whichever holds fewer requests."""
        number = len(self._under_way)
        two = self._rng.sample(range(number), min(2, number))
        return min(two, key=self._under_way.__getitem__)


class PackAware(Router):
    """The books of ``serving/router.py``; every ``Load.elsewhere`` is of its last change."""

    def __init__(
        self, num_replicas: int, chars_per_s: float, fill_s: float, rng: random.Random
    ) -> None:
        self.loads = [Load(chars_per_s) for _ in range(num_replicas)]
        self._order = rng.sample(range(num_replicas), num_replicas)
        self._in_order = [self.loads[replica] for replica in self._order]
        self._mean = MeanChars()
        self._fill_s = fill_s
        self._cache: list[int | None] = [None] * num_replicas
        self._updated = [-math.inf] * num_replicas
        self._updates: deque[tuple[float, int]] = deque()

    def choose(self, work: Work, now: float) -> int:
        """What ``choice.py`` says."""
        while self._updates and now - self._updates[0][0] > CACHE_S:
            at, replica = self._updates.popleft()
            if self._updated[replica] == at:
                self._cache[replica] = None
                self._estimate(replica)
        return self._order[choose(work, self._in_order, self._fill_s)]

    def on_send(self, request: Request, now: float) -> None:
        """Counted from the moment of the choice."""
        self.loads[request.replica].add(request.work)
        self._mean.add(request.work)
        self._update(request.replica, (self._cache[request.replica] or 0) + 1, now)

    def on_accept(self, request: Request, number: int, now: float) -> None:
        """The replica's word replaces the estimate."""
        self._update(request.replica, number, now)

    def on_answer(self, request: Request, now: float) -> None:
        """One less there."""
        self.loads[request.replica].remove(request.work)
        cached = self._cache[request.replica]
        if cached is None:
            self._estimate(request.replica)
        else:
            self._update(request.replica, max(0, cached - 1), now)

    def _update(self, replica: int, number: int, now: float) -> None:
        self._cache[replica], self._updated[replica] = number, now
        self._updates.append((now, replica))
        self._estimate(replica)

    def _estimate(self, replica: int) -> None:
        self.loads[replica].see(self._cache[replica] or 0, self._mean.value)


@dataclass
class Tally:
    """What was measured: requests that came, and steps that began, after the warm-up.

    Attributes:
        latencies_s: of requests, from front to front.
        answered: while traffic lasted.
        rungs: requests by rung.
        composites: sequences in the upper layers.
        busy_s: of all engines.
    """

    latencies_s: list[float] = field(default_factory=list)
    answered: int = 0
    rungs: Counter[str] = field(default_factory=Counter)
    composites: int = 0
    busy_s: float = 0.0


class Simulation:
    """Fronts and replicas under the traffic of a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.traffic, self.tally = setting, Traffic(setting), Tally()
        self.engines = self._make_engines()
        self._under_way = [0] * setting.replicas
        rng = random.Random(setting.seed + 1)
        self.routers = [self._make_router(rng) for _ in range(setting.fronts)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def _make_engines(self) -> list[Engine]:
        calibration = self.setting.calibration
        costs = calibration.costs()
        return [Engine(calibration, costs) for _ in range(self.setting.replicas)]

    def _make_router(self, rng: random.Random) -> Router:
        setting = self.setting
        if setting.router == "round-robin":
            return RoundRobin(setting.replicas, rng)
        if setting.router == "power-of-two":
            return PowerOfTwo(self._under_way, rng)
        chars_per_s = CHARS_PER_TOKEN * setting.calibration.tokens_per_s
        return PackAware(setting.replicas, chars_per_s, setting.fill_s, rng)

    def run(self, on_second: Callable[[], None] = lambda: None) -> Tally:
        """Until every request is answered; ``on_second`` is called for each second of traffic."""
        self._expect_next()
        seconds = 0
        while self._events:
            now, _, event, arguments = heapq.heappop(self._events)
            event(now, *arguments)
            while seconds < min(now, self.traffic.end) - 1:
                seconds += 1
                on_second()
        return self.tally

    def _at(self, when: float, event: Callable[..., None], *arguments: Any) -> None:
        self._number += 1  # so that events of one moment keep their order
        heapq.heappush(self._events, (when, self._number, event, arguments))

    def _is_measured(self, when: float) -> bool:
        return WARM_UP_S <= when < self.traffic.end

    def _expect_next(self) -> None:
        request = self.traffic.next()
        if request is not None:
            self._at(request.at, self._arrive, request)

    def _arrive(self, now: float, request: Request) -> None:
        self._expect_next()
        router = self.routers[request.front]
        request.replica = router.choose(request.work, now)
        router.on_send(request, now)
        self._under_way[request.replica] += 1
        self._at(now + self.setting.delay_s, self._receive, request)

    def _receive(self, now: float, request: Request) -> None:
        engine, router = self.engines[request.replica], self.routers[request.front]
        request.received = now
        engine.add(request)
        self._at(now + self.setting.delay_s, self._accept, router, request, engine.under_way)
        if not engine.running:
            self._start(now, engine)

    def _accept(self, now: float, router: Router, request: Request, number: int) -> None:
        router.on_accept(request, number, now)

    def _start(self, now: float, engine: Engine) -> None:
        composites, seconds = engine.start(now)
        self._at(now + seconds, self._finish, engine)
        if self._is_measured(now):
            self.tally.busy_s += seconds
            self.tally.composites += len(composites)
            for rung, group in composites:
                self.tally.rungs[str(rung)] += len(group)

    def _finish(self, now: float, engine: Engine) -> None:
        for request in engine.running:
            self._under_way[request.replica] -= 1
            self._at(now + self.setting.delay_s, self._answer, request)
        engine.running = []
        if engine.waiting:
            self._start(now, engine)

    def _answer(self, now: float, request: Request) -> None:
        self.routers[request.front].on_answer(request, now)
        self.tally.answered += self._is_measured(now)
        if self._is_measured(request.at):
            self.tally.latencies_s.append(now - request.at)


def measure(setting: Setting, on_second: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One row of the report; the width is requests over sequences of the upper layers."""
    began = time.process_time()
    tally = Simulation(setting).run(on_second)
    latencies = sorted(tally.latencies_s)
    ran = tally.rungs.total()
    return {
        "replicas": setting.replicas,
        "router": setting.router,
        "fronts": setting.fronts,
        "simulated_s": setting.seconds,
        "requests": len(latencies),
        "offered_per_s": len(latencies) / setting.seconds,
        "throughput_per_s": tally.answered / setting.seconds,
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_ms": 1e3 * latencies[int(0.99 * len(latencies))],
        "width": ran / tally.composites,
        "busy": tally.busy_s / (setting.replicas * setting.seconds),
        "rungs": {rung: number / ran for rung, number in sorted(tally.rungs.items())},
        "cpu_s": time.process_time() - began,
    }


def periods_s(requests_per_s: float, seconds: float, requests: int) -> float:
    """Traffic to measure: whole periods, at least one."""
    wanted = min(seconds, requests / requests_per_s - WARM_UP_S)
    return PERIOD_S * max(1, int(wanted / PERIOD_S))


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What people read, in 80 columns."""
    table = Table(
        "engines", "router", "fronts", "s", "answers\nper s", "p50\nms", "p99\nms", "width",
        "busy", "alone", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.columns[1].no_wrap, table.columns[1].min_width = True, max(map(len, STYLES))
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before["replicas"] != row["replicas"]:
            table.add_section()
        table.add_row(
            f"{row['replicas']:,}",
            row["router"],
            str(row["fronts"]),
            f"{row['simulated_s']:g}",
            f"{row['throughput_per_s']:,.1f}",
            f"{row['p50_ms']:,.0f}",
            f"{row['p99_ms']:,.0f}",
            f"{row['width']:.2f}",
            f"{row['busy']:.0%}",
            f"{row['rungs'].get('alone', 0):.0%}",
        )
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report: four panels over the number of replicas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "mean width": lambda row: row["width"],
        "p99 latency, ms": lambda row: row["p99_ms"],
        "requests/s per replica": lambda row: row["throughput_per_s"] / row["replicas"],
        "time that replicas compute, %": lambda row: 100 * row["busy"],
    }
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for axes, (name, value) in zip(grid.flat, panels.items(), strict=True):
        for router, style in STYLES.items():
            rows = [row for row in report["points"] if row["router"] == router]
            if rows:
                numbers = [row["replicas"] for row in rows]
                axes.plot(numbers, [value(row) for row in rows], style, label=router)
        axes.set_ylabel(name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("replicas")
    grid[0][0].legend(fontsize=8)
    given = report["setting"]
    figure.suptitle(f"Simulated, {given['load']:.0%} load, filled to {given['fill_s']:g} s")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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
    """Numbers of replicas. Raises ValueError for what is none."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isdigit() and int(word)):
            raise ValueError(f"--replicas: expected positive integers, found {word!r}")
    return [int(word) for word in words]


def read_routers(text: str) -> list[str]:
    """Their names. Raises ValueError for an unknown one."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in STYLES:
            raise ValueError(f"--routers: expected some of {', '.join(STYLES)}, found {word!r}")
    return words


def main(
    replicas: Annotated[str, typer.Option(help="Numbers of them.")] = "1,2,4,10,30,100,300,1000",
    routers: Annotated[str, typer.Option(help="Which of them.")] = ",".join(STYLES),
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, no table.")] = False,
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
