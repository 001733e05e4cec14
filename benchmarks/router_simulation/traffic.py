"""The requests of a setting, the same ones for every router."""

import random
from dataclasses import dataclass

from revmux_vllm.protocol import CHARS_PER_TOKEN
from revmux_vllm.serving.messages import Work
from router_simulation.setting import NUM_TENANTS, PEAK_S, PERIOD_S, WARM_UP_S, Setting, draw_tokens


@dataclass(slots=True, eq=False)
class Request:
    """One request; it comes to its ``front`` ``at`` so many seconds."""

    at: float
    tokens: int
    work: Work
    front: int
    replica: int = 0


class Traffic:
    """Requests in the order of their arrival."""

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
