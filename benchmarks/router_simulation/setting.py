"""What is simulated: the engine, the traffic and the cluster of one point.

The engine by default is LLaMA, 12 layers, D=768, on one core, from docs/measurements.md (*Under
load*): 9.9 requests/s of 32 tokens in bursts, that is 317 tokens/s in steps of 2,048 tokens (vLLM's
budgets for a CPU server), and 142 ms for one such request at light load. So a step costs 40 ms, and
0.26 ms per layer and row. That the 40 ms are 2 per layer and 16 besides is a guess, and only their
sum matters here. At mux:4 it answers 2.27 times as much; measured were at least 2.25 over HTTP and
2.31 without.
"""

import json
import math
import random
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError, within
from revmux_vllm.planning.costs import LayerCosts
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.serving.options import ServeOptions

MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 33, 0.8, 512
PERIOD_S, PEAK_S = 30.0, 10.0
WARM_UP_S = 10.0
NUM_TENANTS = 20
FILL_MS = float(ServeOptions.model_fields["fill_ms"].default)


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
        for name, value in vars(self).items():
            if name != "rungs" and (not isinstance(value, int | float) or value < 0):
                raise UserError(name, expected="a number, none below 0", found=value)
        _ = self.config  # raises where it cannot be

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Raises UserError unless the file has these keys, all of them and no others."""
        names = {field.name for field in fields(cls)}
        with within(f"`calibrate` {path}", str):  # keys as the file has them
            try:
                values = json.loads(path.read_text())
            except ValueError as error:
                raise UserError("", f"not JSON: {error}") from error
            if not isinstance(values, dict) or set(values) != names:
                raise UserError("", expected=f"the keys {', '.join(sorted(names))}")
            return cls(**values | {"rungs": tuple(values["rungs"])})

    @property
    def config(self) -> RevMuxConfig:
        """Of a checkpoint with these rungs."""
        return RevMuxConfig(parse_rungs(self.rungs), self.prefill_layers)

    def costs(self) -> LayerCosts:
        """Given."""
        return GivenCosts(self)

    @property
    def tokens_per_s(self) -> float:
        """In full steps at the widest rung."""
        costs = self.costs()
        rungs = Rung(), *parse_rungs(self.rungs)
        return max(costs.tokens_per_s(rung, self.max_tokens) for rung in rungs)


class GivenCosts(LayerCosts):
    """``LayerCosts`` that are not fitted to a run, nothing for attention, since texts are short."""

    known = True

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(calibration.prefill_layers, calibration.layers)
        self._line = calibration.seconds_per_layer, calibration.seconds_per_layer_and_token
        self.overhead_s = calibration.overhead_s

    def per_layer(self) -> tuple[float, float, float]:
        """As it was given."""
        return *self._line, 0.0


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


@cache
def mean_tokens() -> float:
    """Of the lengths that the traffic has."""
    rng = random.Random(0)
    return sum(draw_tokens(rng) for _ in range(100_000)) / 100_000


def draw_tokens(rng: random.Random) -> int:
    """The length of a text."""
    return max(1, min(MOST_TOKENS, round(rng.lognormvariate(math.log(MEDIAN_TOKENS), SIGMA))))
