"""``revmux bench offline`` over shapes of random weights, with several cuts l and with T5.

    python benchmarks/offline.py                              12 layers, D=768, random weights
    python benchmarks/offline.py --family bert
    python benchmarks/offline.py --family modernbert --tokens 2048 --requests 16
    python benchmarks/offline.py --model revmux-llama --texts examples/sentences.txt
    python benchmarks/offline.py --write my-llama             and no more: for `revmux bench online
                                                              my-llama --load-format dummy`

vLLM has no T5: with ``--family t5`` the ratios are to RevMUX's own T5 alone, at width 1, and
transformers' T5 in padded batches stands beside it, on one thread as the engine computes here.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from revmux_vllm.bench.cli import measuring, read_rungs
from revmux_vllm.bench.lengths import Lengths
from revmux_vllm.bench.offline import Prompts, Rate, run
from revmux_vllm.bench.settings import OfflineSettings
from revmux_vllm.bench.tables import offline_table
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.terminal import AsJson, make_console

MOST_TOKENS = 512
"""Of the shapes that name no other number of positions."""
VOCAB_SIZE = 32_000
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": MOST_TOKENS,
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
    "modernbert": COMMON
    | {
        "model_type": "modernbert",
        "intermediate_size": 1152,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "max_position_embeddings": 8192,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        "architectures": ["RevMuxModernBertForSequenceClassification"],
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
CUTS: dict[int, tuple[Rung, ...]] = {3: RUNGS, 1: (Rung(mux=4),)}
"""Prefill layers l to the rungs that are measured there."""


def write_shape(folder: Path, family: str, prefill_layers: int, rungs: tuple[Rung, ...]) -> None:
    """A folder that describes the benchmark's model; its weights are drawn at random."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("negative", "positive")
    revmux = RevMuxConfig(
        rungs,
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
    most = SHAPES[family].get("max_position_embeddings", MOST_TOKENS)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=most).save_pretrained(
        folder
    )


def write_cuts(root: Path, family: str, rungs: tuple[Rung, ...] | None) -> tuple[str, ...]:
    """The folders of a family's shape, one for every cut that has some of ``rungs``, or of all."""
    folders = []
    for cut, own in CUTS.items():
        if chosen := tuple(rung for rung in own if rungs is None or rung in rungs):
            folders.append(f"{root / family}-l{cut}")
            write_shape(Path(folders[-1]), family, cut, chosen)
    if not folders:
        raise UserError("`rungs`", expected=f"some of {', '.join(map(str, RUNGS))}", found=rungs)
    return tuple(folders)


class BatchedT5:
    """Transformers' T5 with random weights, as one would run it without an engine."""

    BATCH = 32

    def __init__(self, shape: dict[str, Any], dtype: str) -> None:
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        torch.set_num_threads(1)
        config = T5Config(**shape | {"is_encoder_decoder": True})
        self.model = T5ForConditionalGeneration(config).to(getattr(torch, dtype)).eval()

    def rate(self, prompts: Prompts) -> float:
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
    family: Annotated[
        str, typer.Option(help=f"Shape of the random weights: {', '.join(SHAPES)}.")
    ] = ("llama"),
    texts: Annotated[Path | None, typer.Option(help="Its prompts, one a line.")] = None,
    rungs: Annotated[str, typer.Option(help="Only these, as in merge:2,mux:2.")] = "",
    requests: Annotated[int, typer.Option(help="Prompts per round.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens per random prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds after one warm-up.")] = 5,
    dtype: Annotated[str, typer.Option(help="Engine dtype.")] = "float32",
    as_json: AsJson = False,
    write: Annotated[
        Path | None, typer.Option(help="Only write the shape of --family to this new folder.")
    ] = None,
) -> None:
    """Measure the ratio of every configuration to plain vLLM."""
    with measuring():
        if family not in SHAPES:
            raise UserError("`family`", expected=" or ".join(SHAPES), found=family)
        if write is not None:
            cut = next(iter(CUTS))
            write_shape(write, family, cut, CUTS[cut])
            return
        console, chosen = make_console(stderr=True), read_rungs(rungs or None)
        with tempfile.TemporaryDirectory(prefix="revmux-shapes-") as root:
            beside: dict[str, Rate] = {}
            if model:
                kind = OfflineSettings((model,), Lengths("texts"), chosen, texts=texts)
            else:
                folders = write_cuts(Path(root), family, chosen)
                kind = OfflineSettings(folders, Lengths("fixed", tokens), load_format="dummy")
                if family == "t5":
                    beside["transformers"] = BatchedT5(SHAPES[family], dtype).rate
            settings = replace(kind, requests=requests, rounds=rounds, dtype=dtype)
            report = run(settings, console, beside)
    if as_json:
        print(json.dumps(report))
    else:
        make_console().print(offline_table(report))


if __name__ == "__main__":
    typer.run(main)
