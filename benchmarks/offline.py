"""Engine-only throughput against plain vLLM on the same backbone, in the same run.

Plain vLLM and every multiplexed configuration classify the same prompts in turn, in alternating
order; each ratio compares two neighbours in time. No HTTP and no tokenising: prompts are token
ids. Schedulers run in this process, so that one engine serves several rungs.

    python benchmarks/offline.py                              12 layers, D=768, random weights
    python benchmarks/offline.py --model revmux-llama --texts examples/sentences.txt
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from revmux_vllm import bundled, checkpoint
from revmux_vllm.config import RevMuxConfig, layer_limit
from revmux_vllm.engine.policy import Policy
from revmux_vllm.rungs import Rung, parse_rungs

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "id2label": {"0": "negative", "1": "positive"},
    "architectures": ["RevMuxLlamaForSequenceClassification"],
}
RUNGS = parse_rungs(["mux:2", "mux:4", "mux:8", "merge:2", "merge:4", "merge:2+mux:2"])
CONFIGURATIONS = [(rung, 3) for rung in RUNGS] + [(Rung(mux=4), 1)]  # rung, prefill layers l


def write_shape(root: Path, prefill_layers: int) -> Path:
    """A folder that describes the benchmark's model; its weights are drawn at random."""
    revmux = RevMuxConfig(RUNGS, prefill_layers, adapter_hidden_size=768)
    folder = root / f"l{prefill_layers}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | {"revmux": revmux.to_dict()}))
    return folder


class Engine:
    """An engine, and how fast it answers at one rung."""

    def __init__(self, model: str, plain: bool, dummy: bool, dtype: str) -> None:
        from vllm import LLM

        options: dict[str, Any] = {"dtype": dtype, "max_model_len": 512}
        if dummy:
            options |= {"load_format": "dummy", "skip_tokenizer_init": True}
        if plain:
            options["hf_overrides"] = {"architectures": ["LlamaForSequenceClassification"]}
            options["kv_cache_memory_bytes"] = 1 << 30
            options["enable_prefix_caching"] = False  # or repeated rounds are answered from it
        self.llm = LLM(model, distributed_executor_backend="mp", **options)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]

    def rate(self, prompts: list[list[int]], rung: Rung | None) -> float:
        """Requests per second; ``rung`` None for plain vLLM."""
        from vllm import TokensPrompt

        if rung is not None:
            self.scheduler.policy = Policy(self.scheduler.revmux.kind(rung))
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        start = time.perf_counter()
        self.llm.classify(inputs, use_tqdm=False)
        return len(prompts) / (time.perf_counter() - start)


def main(
    model: Annotated[str, typer.Option(help="Checkpoint in place of random weights.")] = "",
    texts: Annotated[Path | None, typer.Option(help="Its prompts, one a line.")] = None,
    rungs: Annotated[str, typer.Option(help="Only these, as in merge:2,mux:2.")] = "",
    requests: Annotated[int, typer.Option(help="Prompts per round.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens per random prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds after one warm-up.")] = 5,
    dtype: Annotated[str, typer.Option(help="Engine dtype.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Measure the ratio of every configuration to plain vLLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # standard output is the report's
    console = Console(stderr=True)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        if model:
            folder = bundled.resolve(model)
            config, values = checkpoint.read_config(folder)
            layers, cuts = values["num_hidden_layers"], (config.prefill_layers,)
            configurations = [(rung, config.prefill_layers) for rung in config.rungs]
            folders = {config.prefill_layers: folder}
            prompts = text_prompts(folder, texts, requests)
        else:
            layers, configurations = SHAPE["num_hidden_layers"], CONFIGURATIONS
            cuts = tuple(dict.fromkeys(cut for _, cut in configurations))
            folders = {cut: write_shape(Path(scratch), cut) for cut in cuts}
            prompts = [[rng.randrange(32_000) for _ in range(tokens)] for _ in range(requests)]
        if rungs:
            wanted = parse_rungs(rungs.split(","))
            configurations = [own for own in configurations if own[0] in wanted]
            cuts = tuple(dict.fromkeys(cut for _, cut in configurations))
        plain_model = str(folders[cuts[0]])
        if model:
            plain_model = checkpoint.plain_backbone(folder, Path(scratch))
        with Progress(console=console) as progress:
            task = progress.add_task("starting engines", total=None)
            plain = Engine(plain_model, True, not model, dtype)
            engines = {cut: Engine(str(folders[cut]), False, not model, dtype) for cut in cuts}
            contenders: list[Any] = [("plain", plain, None)]
            contenders += [((rung, cut), engines[cut], rung) for rung, cut in configurations]
            progress.update(task, description="measuring", total=(rounds + 1) * len(contenders))
            rates: dict[Any, list[float]] = {name: [] for name, *_ in contenders}
            for turn in range(rounds + 1):
                for name, engine, rung in contenders if turn % 2 else reversed(contenders):
                    rates[name].append(engine.rate(prompts, rung))
                    progress.advance(task)
    for values_ in rates.values():
        del values_[0]  # the warm-up
    report = {
        "requests": requests,
        "mean_tokens": statistics.mean(map(len, prompts)),
        "rounds": rounds,
        "dtype": dtype,
        "plain_requests_per_s": statistics.median(rates["plain"]),
        "configurations": [
            summary(rates[(rung, cut)], rates["plain"], rung, cut, layers)
            for rung, cut in configurations
        ],
    }
    if as_json:
        print(json.dumps(report))
    else:
        Console().print(as_table(report))
    sys.stdout.flush()
    for engine in (plain, *engines.values()):
        engine.llm.llm_engine.engine_core.shutdown()


def text_prompts(folder: Path, texts: Path | None, requests: int) -> list[list[int]]:
    """Token ids of the lines of a file, repeated as needed."""
    from transformers import AutoTokenizer

    if texts is None:
        raise typer.BadParameter("--model needs --texts")
    lines = texts.read_text(encoding="utf-8").splitlines()
    ids = AutoTokenizer.from_pretrained(folder)(lines)["input_ids"]
    return [ids[i % len(ids)] for i in range(requests)]


def summary(
    rates: list[float], plain: list[float], rung: Rung, cut: int, layers: Any
) -> dict[str, Any]:
    """Median and spread of one configuration against plain vLLM, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(rates, plain, strict=True)]
    limit = layer_limit(rung.saving, cut, layers)
    return {
        "rung": str(rung),
        "prefill_layers": cut,
        "requests_per_s": statistics.median(rates),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "layer_limit": limit,
        "ratio_over_limit": statistics.median(ratios) / limit,
    }


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    table = Table(
        title=f"{report['requests']} prompts of {report['mean_tokens']:.0f} tokens on average, "
        f"{report['dtype']}, median of {report['rounds']} rounds"
    )
    for column in ("", "requests/s", "ratio (lowest to highest)", "layer limit", "ratio / limit"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("plain vLLM", f"{report['plain_requests_per_s']:.1f}", "1", "1", "")
    for row in report["configurations"]:
        table.add_row(
            f"{row['rung']}, l={row['prefill_layers']}",
            f"{row['requests_per_s']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            f"{row['layer_limit']:.2f}",
            f"{row['ratio_over_limit']:.2f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
