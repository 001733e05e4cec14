"""``revmux bench offline`` over shapes of random weights, with several cuts l and with T5.

    python benchmarks/offline.py                              12 layers, D=768, random weights
    python benchmarks/offline.py --family bert
    python benchmarks/offline.py --model revmux-llama --texts examples/sentences.txt
    python benchmarks/offline.py --write my-llama             and no more: for `revmux bench online
                                                              my-llama --load-format dummy`

vLLM has no T5: with ``--family t5`` the ratios are to RevMUX's own T5 at width 1, and transformers'
T5 in padded batches stands beside it, on one thread as the engine computes here.
"""

import json
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from revmux_vllm.bench.lengths import Lengths, make_prompts
from revmux_vllm.bench.offline import (
    Contender,
    Engine,
    as_report,
    compare,
    measure,
    schedule_in_this_process,
    summary,
)
from revmux_vllm.bench.settings import most_tokens, read_model
from revmux_vllm.bench.tables import offline_table
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung, parse_rungs

MAX_MODEL_LEN = 512
VOCAB_SIZE = 32_000
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": MAX_MODEL_LEN,
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
        "vocab_size": VOCAB_SIZE,
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


def write_shape(folder: Path, family: str, prefill_layers: int) -> None:
    """A folder that describes the benchmark's model; its weights are drawn at random."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("negative", "positive")
    revmux = RevMuxConfig(
        RUNGS,
        prefill_layers,
        adapter_hidden_size=768,
        label_words=words if family == "t5" else None,
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[family] | {"revmux": revmux.to_dict()}))
    names = [*words, *(f"w{i}" for i in range(len(words), VOCAB_SIZE))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_MODEL_LEN
    ).save_pretrained(folder)


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
    write: Annotated[
        Path | None, typer.Option(help="Only write the shape of --family to this new folder.")
    ] = None,
) -> None:
    """Measure the ratio of every configuration to plain vLLM."""
    schedule_in_this_process()
    if family not in SHAPES:
        raise typer.BadParameter(f"--family {family}: expected {', '.join(SHAPES)}")
    if write is not None:
        write_shape(write, family, CONFIGURATIONS[0][1])
        return
    if model:
        report = of_checkpoint(model, texts, rungs, requests, rounds, dtype)
    else:
        rng = random.Random(0)
        prompts = [[rng.randrange(1, VOCAB_SIZE) for _ in range(tokens)] for _ in range(requests)]
        report = of_shape(family, chosen(CONFIGURATIONS, rungs), prompts, rounds, dtype)
    if as_json:
        print(json.dumps(report))
    else:
        Console().print(offline_table(report))


def chosen(own: list[tuple[Rung, int]], rungs: str) -> list[tuple[Rung, int]]:
    """The configurations of some rungs; all for none."""
    wanted = parse_rungs(rungs.split(",")) if rungs else [rung for rung, _ in own]
    if not (found := [(rung, cut) for rung, cut in own if rung in wanted]):
        raise typer.BadParameter(f"--rungs {rungs}: none of {', '.join(str(r) for r, _ in own)}")
    return found


def of_checkpoint(
    model: str, texts: Path | None, rungs: str, requests: int, rounds: int, dtype: str
) -> dict[str, Any]:
    """What ``revmux bench offline`` measures."""
    from transformers import AutoTokenizer

    if texts is None:
        raise typer.BadParameter("--model needs --texts")
    try:
        folder, config, values = read_model(model)
    except ValueError as error:
        raise typer.BadParameter(f"--model: {error}") from error
    own = chosen([(rung, config.prefill_layers) for rung in config.rungs], rungs)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    most = most_tokens(folder, tokenizer)
    prompts = make_prompts(tokenizer, Lengths("texts"), most, 0, texts, requests)
    return compare(
        folder,
        config,
        values,
        prompts,
        rungs=[rung for rung, _ in own],
        rounds=rounds,
        console=Console(stderr=True),
        dtype=dtype,
    )


def of_shape(
    family: str,
    configurations: list[tuple[Rung, int]],
    prompts: list[list[int]],
    rounds: int,
    dtype: str,
) -> dict[str, Any]:
    """Random weights, an engine for every cut."""
    cuts = dict.fromkeys(cut for _, cut in configurations)
    values, layers = SHAPES[family], COMMON["num_hidden_layers"]
    plain_name = values["architectures"][0].removeprefix("RevMux")
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        task = progress.add_task("starting engines", total=len(cuts) + (family != "t5"))

        def start(cut: int, plain: str | None) -> Engine:
            if not (root / f"l{cut}").exists():
                write_shape(root / f"l{cut}", family, cut)
            options = {"dtype": dtype, "max_model_len": MAX_MODEL_LEN, "load_format": "dummy"}
            engine = Engine(str(root / f"l{cut}"), plain, **options)
            stack.callback(engine.close)
            progress.advance(task)
            return engine

        engines = {cut: start(cut, None) for cut in cuts}
        contenders: list[Contender] = [
            ((rung, cut), engines[cut], rung) for rung, cut in configurations
        ]
        first = next(iter(cuts))
        if family == "t5":
            contenders.append(("transformers", BatchedT5(values, dtype), None))
            contenders.append(("plain", engines[first], Rung()))
        else:
            contenders.append(("plain", start(first, plain_name), None))
        rates = measure(contenders, prompts, rounds, progress)
    rows = [summary(rates[own], rates["plain"], *own, layers) for own in configurations]
    report = as_report(prompts, rounds, dtype, rates["plain"], rows)
    if family == "t5":
        report["baseline"] = "width 1"
        report["transformers_requests_per_s"] = statistics.median(rates["transformers"])
    return report


if __name__ == "__main__":
    typer.run(main)
