"""Throughput of every rung against plain vLLM, and latency at a quarter load, shape by shape.

Rates and ratios are made as ``revmux bench offline`` makes them: the same prompts for all, in
alternating order, after a round to warm up, and every ratio compares the two of one round.
"""

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from gpu.child import Child
from gpu.engines import Served
from gpu.results import NUMBER, Outcome
from gpu.shapes import Shape, write_shape
from revmux_vllm import checkpoint
from revmux_vllm.bench.offline import measure, summary
from revmux_vllm.config import layer_limit
from revmux_vllm.rungs import Rung

PLAIN, ALONE, LOAD = "plain vLLM", "alone", "load"
CALL_S = 300.0
"""No round takes longer."""
LOAD_SHARE = 0.25
VISITS = ("ours", "plain", "plain", "ours")
"""In which order the engines are offered the quarter load."""
MOST_REQUESTS = 5000
PERCENTILES = (50, 95, 99)

Left = Callable[[float], float]
"""From seconds to what is left of the time, if that is less."""


class Pair:
    """Both engines of a shape: RevMUX's with all rungs, and plain vLLM's.

    Args:
        shape: of both.
        rungs: of the checkpoint.
        options: of ``vllm.LLM`` for both.
        folder: for the folders that describe the models; new.
        logs: folder.
        left: how much time there is.

    Raises:
        ChildError: if one of them does not start.
    """

    def __init__(
        self,
        shape: Shape,
        rungs: tuple[Rung, ...],
        options: dict[str, Any],
        folder: Path,
        logs: Path,
        left: Left,
    ) -> None:
        self.shape, self.rungs, self._left = shape, rungs, left
        model, backbone = folder / "checkpoint", folder / "backbone"
        write_shape(model, shape, rungs)
        backbone.mkdir()
        with ExitStack() as stack:
            options = options | {"enable_prefix_caching": False}  # or rounds are answered from it
            self.ours = self._start(stack, str(model), options, logs / f"{shape.name}-revmux.log")
            where = checkpoint.plain_backbone(model, backbone)
            self.plain = self._start(stack, where, options, logs / f"{shape.name}-plain.log")
            self._stack = stack.pop_all()

    def _start(self, stack: ExitStack, model: str, options: dict[str, Any], log: Path) -> Child:
        child = Child(Served, model, options, log=log, timeout_s=self._left(600.0))
        stack.callback(child.close)
        return child

    def close(self) -> None:
        """End both."""
        self._stack.close()

    def facts(self) -> dict[str, Any]:
        """What each runs on."""
        return {
            "revmux": self.ours.call("facts", timeout_s=self._left(60.0)),
            "plain": self.plain.call("facts", timeout_s=self._left(60.0)),
        }

    def prompts(self, length: int, count: int, seed: int) -> list[list[int]]:
        """Random token ids; 0 is padding and in none of them."""
        rng = random.Random(f"{seed}-{length}")
        most = self.shape.vocab_size - 1
        return [[rng.randint(1, most) for _ in range(length)] for _ in range(count)]

    def rate(self, child: Child, rungs: Any) -> Callable[[Sequence[Sequence[int]]], float]:
        """How fast an engine answers prompts that all wait at once: requests per second."""

        def rate(prompts: Sequence[Sequence[int]]) -> float:
            seconds = child.call("seconds", rungs, prompts, timeout_s=self._left(CALL_S))
            return len(prompts) / float(seconds)

        return rate

    def throughput(self, length: int, rounds: int, seed: int, progress: Progress) -> Outcome:
        """Requests per second of both engines, rung by rung, for prompts of one length."""
        prompts = self.prompts(length, self.shape.requests(length), seed)
        shape = self.shape.prefill_layers, self.shape.num_layers
        widest = max(self.rungs, key=lambda rung: rung.saving(*shape))
        limited_by = {ALONE: Rung(), **{str(rung): rung for rung in self.rungs}, LOAD: widest}
        limits = {name: layer_limit(rung, *shape) for name, rung in limited_by.items()}
        at = {ALONE: Rung(), **{str(rung): rung for rung in self.rungs}, LOAD: self.rungs}
        contenders: dict[Any, Any] = {PLAIN: self.rate(self.plain, None)}
        contenders |= {name: self.rate(self.ours, rungs) for name, rungs in at.items()}
        rates = measure(contenders, prompts, rounds, progress)
        rows = [summary(rates[name], rates[PLAIN], limits[name]) | {"rung": name} for name in at]
        plain = statistics.median(rates[PLAIN])
        best = max(rows, key=lambda row: float(row["ratio"]))
        says = f"plain {plain:.1f} requests/s; best {best['rung']} {best['ratio']:.2f}x"
        details = {
            "shape": self.shape.name,
            "length": length,
            "requests": len(prompts),
            "rounds": rounds,
            "plain_requests_per_s": plain,
            "plain_rates": rates[PLAIN],
            "rows": rows,
        }
        return Outcome(NUMBER, says, details)

    def capacity(self, length: int, seed: int) -> float:
        """Requests per second of plain vLLM in one round after another to warm up."""
        prompts = self.prompts(length, self.shape.requests(length), seed)
        rate = self.rate(self.plain, None)
        rate(prompts)
        return rate(prompts)

    def latency(
        self, length: int, capacity: float, seconds: float, seed: int, advance: Callable[[], None]
    ) -> Outcome:
        """Latencies of both engines, offered a quarter of what plain vLLM answered in bursts."""
        offered = LOAD_SHARE * capacity
        number = min(MOST_REQUESTS, max(20, round(offered * seconds)))
        prompts = self.prompts(length, min(number, 256), seed)
        latencies: dict[str, list[list[float]]] = {"ours": [], "plain": []}
        by_rung: dict[str, int] = {}
        for who in ("ours", "plain"):  # to warm up
            self._offer(who, prompts, min(number, 20), 1 / offered)
        for who in VISITS:
            found, rungs = self._offer(who, prompts, number, 1 / offered)
            latencies[who].append(found)
            by_rung |= {rung: by_rung.get(rung, 0) + n for rung, n in rungs.items()}
            advance()
        return quarter_load(self.shape.name, length, offered, latencies, by_rung)

    def _offer(
        self, who: str, prompts: list[list[int]], number: int, gap_s: float
    ) -> tuple[list[float], dict[str, int]]:
        child, rungs = (self.ours, self.rungs) if who == "ours" else (self.plain, None)
        timeout_s = self._left(CALL_S + 2 * number * gap_s)
        found: tuple[list[float], dict[str, int]]
        found = child.call("latencies", rungs, prompts, number, gap_s, timeout_s=timeout_s)
        return found


def quarter_load(
    shape: str,
    length: int,
    offered: float,
    latencies: dict[str, list[list[float]]],
    by_rung: dict[str, int],
) -> Outcome:
    """Percentiles of both engines in milliseconds, and the ratio of each in every pair of visits.

    Args:
        shape: name.
        length: of the prompts.
        offered: requests per second.
        latencies: seconds, of ``ours`` and of ``plain``, visit by visit.
        by_rung: requests of ours by rung.
    """
    details: dict[str, Any] = {
        "shape": shape,
        "length": length,
        "offered_per_s": offered,
        "requests": sum(map(len, latencies["ours"])),
        "requests_by_rung": by_rung,
    }
    says = []
    for percent in PERCENTILES:
        name = f"p{percent}"
        for who, visits in latencies.items():
            details[f"{who}_{name}_ms"] = 1e3 * _percentile([*itertools.chain(*visits)], percent)
        pairs = zip(latencies["ours"], latencies["plain"], strict=True)
        ratios = [_percentile(a, percent) / _percentile(b, percent) for a, b in pairs]
        details[f"{name}_ratios"] = ratios
        details[f"{name}_ratio"] = details[f"ours_{name}_ms"] / details[f"plain_{name}_ms"]
        says.append(
            f"{name} {details[f'ours_{name}_ms']:.1f} and {details[f'plain_{name}_ms']:.1f} ms"
        )
    return Outcome(NUMBER, f"RevMUX and plain at {offered:.1f}/s: {', '.join(says)}", details)


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))
