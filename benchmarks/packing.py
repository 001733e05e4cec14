"""Time to plan a step and padding, over queues of 100 to 100,000 waiting requests.

The real scheduler with a queue of real requests: packing, choosing, vLLM's own ``schedule`` and the
plan. No model runs: every step's requests are aborted and as many new ones arrive. With
``--prefixes`` requests begin with one of so many texts of 400 tokens, and 100 of their own are
behind it; then looking up what the cache has of 1,000 of them is part of the plan.
"""

import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from lone_scheduler import BLOCK_TOKENS, lone_scheduler
from rich.console import Console
from rich.table import Table

from revmux_vllm.config import FORMAT_VERSION
from revmux_vllm.terminal import AsJson

PREFIX_TOKENS, OWN_TOKENS = 400, 100
LENGTHS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["RevMuxLlamaForSequenceClassification"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "revmux": {
        "rungs": ["mux:2", "mux:4", "mux:8", "merge:2"],
        "prefill_layers": 1,
        "adapter_type": "revmux",
        "format_version": FORMAT_VERSION,
    },
}


def make_scheduler(folder: Path, policy: str, shares: bool) -> Any:
    """The engine's scheduler without an engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.gc_utils import freeze_gc_heap

    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = EngineArgs(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        enable_prefix_caching=shares,
        additional_config={"revmux": {"policy": policy}},
    ).create_engine_config()
    scheduler = lone_scheduler(config, num_blocks=4096)
    freeze_gc_heap()  # as vLLM's engine does before it serves
    return scheduler


class Queue:
    """Requests of log-normal lengths (median 33 tokens, sigma 0.8), or behind one of so many
    ``prefixes``, kept at one number."""

    def __init__(self, scheduler: Any, prefixes: int) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        self.scheduler, self.rng, self.made = scheduler, random.Random(0), 0
        self.prefixes = [self._tokens(PREFIX_TOKENS) for _ in range(prefixes)]
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)

    def fill(self, waiting: int) -> None:
        """Add requests until so many wait."""
        from vllm import PoolingParams
        from vllm.v1.request import Request

        while len(self.scheduler.waiting) < waiting:
            if self.prefixes:
                tokens = self.rng.choice(self.prefixes) + self._tokens(OWN_TOKENS)
            else:
                tokens = [7] * max(1, min(512, int(self.rng.lognormvariate(3.5, 0.8))))
            self.made += 1
            self.scheduler.add_request(
                Request(
                    request_id=str(self.made),
                    prompt_token_ids=tokens,
                    block_hasher=self.hasher if self.prefixes else None,
                    sampling_params=None,
                    pooling_params=PoolingParams(task="classify"),
                )
            )

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(SHAPE["vocab_size"]) for _ in range(count)]

    def step(self) -> tuple[float, float]:
        """Milliseconds of one planned step, and of them those that are not vLLM's own."""
        from vllm.v1.request import RequestStatus

        self.scheduler.planner.counts.clear()
        start = time.perf_counter()
        output = self.scheduler.schedule()
        total_ms = 1e3 * (time.perf_counter() - start)
        names = list(output.num_scheduled_tokens)
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        return total_ms, self.scheduler.planner.counts["us", "plan"] / 1e3


def padding(scheduler: Any) -> float:
    """Composite rows times streams over real tokens, less one, of the last step."""
    counts = scheduler.planner.counts
    return float(counts["composite_slots", ""] / max(1, counts["composite_tokens", ""]) - 1)


def main(
    rounds: Annotated[int, typer.Option(min=5, help="Steps measured at every length.")] = 50,
    policy: Annotated[str, typer.Option(help="As in --additional-config revmux.")] = "fixed:4",
    prefixes: Annotated[int, typer.Option(help="Different beginnings; 0: no cache.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Plan steps over queues of growing length; median, and lowest to highest, in milliseconds."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(Path(folder), policy, prefixes > 0)
        queue = Queue(scheduler, prefixes)
        for waiting in (1_000,) if prefixes else LENGTHS:
            ours, totals, pads = [], [], []
            for _ in range(rounds):
                queue.fill(waiting)
                total_ms, plan_ms = queue.step()
                totals.append(total_ms)
                ours.append(plan_ms)
                pads.append(padding(scheduler))
            report.append(
                {
                    "waiting": waiting,
                    "plan_ms": statistics.median(ours),
                    "plan_ms_range": [min(ours), max(ours)],
                    "schedule_ms": statistics.median(totals),
                    "padding": statistics.median(pads),
                }
            )
    if as_json:
        print(json.dumps({"policy": policy, "rounds": rounds, "queues": report}))
        return
    table = Table("waiting", "plan, ms", "lowest to highest", "with vLLM's own, ms", "padding")
    for row in report:
        low, high = row["plan_ms_range"]
        table.add_row(
            f"{row['waiting']:,}",
            f"{row['plan_ms']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['schedule_ms']:.2f}",
            f"{row['padding']:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
