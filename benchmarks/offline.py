"""Engine-only throughput against plain vLLM on the same backbone, in the same run.

Plain vLLM and every multiplexed configuration classify the same prompts in turn, in alternating
order; each ratio compares the two of one round. No HTTP and no tokenising: prompts are token
ids. Schedulers run in this process, so that one engine serves several rungs.

    python benchmarks/offline.py                              12 layers, D=768, random weights
    python benchmarks/offline.py --family bert
    python benchmarks/offline.py --model revmux-llama --texts examples/sentences.txt

vLLM has no T5: with ``--family t5`` the ratios are to RevMUX's own T5 at width 1, and transformers'
T5 in padded batches stands beside it, on one thread as the engine computes here.
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

COMMON = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "id2label": {"0": "negative", "1": "positive"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": COMMON
    | {
        "model_type": "llama",
        "intermediate_size": 2048,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "architectures": ["RevMuxLlamaForSequenceClassification"],
    },
    "bert": COMMON
    | {
        "model_type": "bert",
        "intermediate_size": 3072,
        "type_vocab_size": 2,
        "architectures": ["RevMuxBertForSequenceClassification"],
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": 32_000,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_heads": 12,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": False,
        "id2label": COMMON["id2label"],
        "architectures": ["RevMuxT5ForSequenceClassification"],
    },
}
RUNGS = parse_rungs(["mux:2", "mux:4", "mux:8", "merge:2", "merge:4", "merge:2+mux:2"])
CONFIGURATIONS = [(rung, 3) for rung in RUNGS] + [(Rung(mux=4), 1)]  # rung, prefill layers l


def write_shape(root: Path, family: str, prefill_layers: int) -> Path:
    """A folder that describes the benchmark's model; its weights are drawn at random."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ("negative", "positive")
    revmux = RevMuxConfig(
        RUNGS,
        prefill_layers,
        adapter_hidden_size=768,
        label_words=words if family == "t5" else None,
    )
    folder = root / f"l{prefill_layers}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[family] | {"revmux": revmux.to_dict()}))
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    tokenizer = Tokenizer(vocabulary)  # for the label words alone: prompts are token ids
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


class Engine:
    """An engine, and how fast it answers at one rung."""

    def __init__(self, model: str, plain: str | None, dummy: bool, dtype: str) -> None:
        from vllm import LLM

        options: dict[str, Any] = {"dtype": dtype, "max_model_len": 512}
        if dummy:
            options |= {"load_format": "dummy", "skip_tokenizer_init": True}
        if plain:
            options["hf_overrides"] = {"architectures": [plain]}
            options["kv_cache_memory_bytes"] = 1 << 30
            options["enable_prefix_caching"] = False  # or repeated rounds are answered from it
        self.llm = LLM(model, distributed_executor_backend="mp", **options)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]

    def rate(self, prompts: list[list[int]], rung: Rung | None) -> float:
        """Requests per second; ``rung`` None for plain vLLM."""
        from vllm import TokensPrompt

        if rung is not None:
            kind = () if rung == Rung() else self.scheduler.revmux.kind(rung)
            self.scheduler.policy = Policy(kind)
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        start = time.perf_counter()
        self.llm.classify(inputs, use_tqdm=False)
        return len(prompts) / (time.perf_counter() - start)


class BatchedT5:
    """Transformers' T5 with random weights, as one would run it without an engine."""

    BATCH = 32

    def __init__(self, shape: dict[str, Any], dtype: str) -> None:
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        torch.set_num_threads(1)
        config = T5Config(**shape | {"is_encoder_decoder": True})
        self.model = T5ForConditionalGeneration(config).to(getattr(torch, dtype)).eval()

    def rate(self, prompts: list[list[int]], rung: None) -> float:
        """Requests per second; prompts of similar length share a batch."""
        import torch

        ordered = sorted(prompts, key=len)
        start = time.perf_counter()
        for first in range(0, len(ordered), self.BATCH):
            batch = ordered[first : first + self.BATCH]
            ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.long)
            for row, prompt in zip(ids, batch, strict=True):
                row[: len(prompt)] = torch.tensor(prompt)
            with torch.inference_mode():
                self.model(ids, (ids > 0).long(), torch.zeros(len(batch), 1, dtype=torch.long))
        return len(prompts) / (time.perf_counter() - start)


def main(
    model: Annotated[str, typer.Option(help="Checkpoint in place of random weights.")] = "",
    family: Annotated[str, typer.Option(help="Shape of the random weights: llama, bert, t5.")] = (
        "llama"
    ),
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
    if family not in SHAPES:
        raise typer.BadParameter(f"--family {family}: expected {', '.join(SHAPES)}")
    console = Console(stderr=True)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        if model:
            folder = bundled.resolve(model)
            config, values = checkpoint.read_config(folder)
            if config.label_words:
                raise typer.BadParameter(
                    "--model: label words; vLLM alone cannot serve that backbone"
                )
            _, layers = checkpoint.backbone_shape(values)
            cuts: tuple[int, ...] = (config.prefill_layers,)
            configurations = [(rung, config.prefill_layers) for rung in config.rungs]
            folders = {config.prefill_layers: folder}
            prompts = text_prompts(folder, texts, requests)
        else:
            values = SHAPES[family]
            layers, configurations = COMMON["num_hidden_layers"], CONFIGURATIONS
            cuts = tuple(dict.fromkeys(cut for _, cut in configurations))
            folders = {cut: write_shape(Path(scratch), family, cut) for cut in cuts}
            prompts = [[rng.randrange(1, 32_000) for _ in range(tokens)] for _ in range(requests)]
        if rungs:
            wanted = parse_rungs(rungs.split(","))
            configurations = [own for own in configurations if own[0] in wanted]
            if not configurations:
                raise typer.BadParameter(f"--rungs {rungs}: none of {', '.join(map(str, RUNGS))}")
            cuts = tuple(dict.fromkeys(cut for _, cut in configurations))
        plain_name = values["architectures"][0].removeprefix("RevMux")
        has_plain = not plain_name.startswith("T5")
        plain_model = str(folders[cuts[0]])
        if model:
            plain_model = checkpoint.plain_backbone(folder, Path(scratch))
        with Progress(console=console) as progress:
            task = progress.add_task("starting engines", total=None)
            engines = {cut: Engine(str(folders[cut]), None, not model, dtype) for cut in cuts}
            started = list(engines.values())
            contenders: list[Any] = [
                ((rung, cut), engines[cut], rung) for rung, cut in configurations
            ]
            if has_plain:
                started.append(Engine(plain_model, plain_name, not model, dtype))
                contenders.append(("plain", started[-1], None))
            else:
                contenders.append(("transformers", BatchedT5(values, dtype), None))
                contenders.append(("plain", engines[cuts[0]], Rung()))
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
        "baseline": "plain vLLM" if has_plain else "width 1",
        "plain_requests_per_s": statistics.median(rates["plain"]),
        "configurations": [
            summary(rates[(rung, cut)], rates["plain"], rung, cut, layers)
            for rung, cut in configurations
        ],
    }
    if not has_plain:
        report["transformers_requests_per_s"] = statistics.median(rates["transformers"])
    if as_json:
        print(json.dumps(report))
    else:
        Console().print(as_table(report))
    sys.stdout.flush()
    for engine in started:
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
    table.add_row(report["baseline"], f"{report['plain_requests_per_s']:.1f}", "1", "1", "")
    if own := report.get("transformers_requests_per_s"):
        ratio = f"{own / report['plain_requests_per_s']:.2f}"
        table.add_row("transformers, batches of 32", f"{own:.1f}", ratio, "", "")
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
