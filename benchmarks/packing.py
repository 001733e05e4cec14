"""Time to plan a step: ``plan_requests`` over 1,024 waiting requests of mixed lengths."""

import random
import statistics
import time

from revmux_vllm.packing import plan_requests
from revmux_vllm.rungs import parse_rungs

REQUESTS, ROUNDS = 1024, 200
RUNGS = parse_rungs(["mux:2", "mux:4", "mux:8", "merge:2"])

if __name__ == "__main__":
    rng = random.Random(0)
    ids = [f"classify-{i}" for i in range(REQUESTS)]
    lengths = [max(1, min(512, int(rng.lognormvariate(3.5, 0.8)))) for _ in ids]
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        plan_requests(ids, lengths, RUNGS, [None] * REQUESTS)
        times.append(1e3 * (time.perf_counter() - start))
    print(
        f"{REQUESTS} requests planned in {statistics.median(times):.3f} ms "
        f"({min(times):.3f} to {max(times):.3f}), median of {ROUNDS}"
    )
