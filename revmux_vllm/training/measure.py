"""Measure a checkpoint folder on labelled rows: what ``revmux eval`` does."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from revmux_vllm import bundled, checkpoint
from revmux_vllm.backbones.base import Backbone, two_class_logits
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError, require
from revmux_vllm.rungs import Rung
from revmux_vllm.training import cascade, data
from revmux_vllm.training.card import front_matter, model_card
from revmux_vllm.training.checks import (
    check_enough,
    check_max_tokens,
    check_pairs,
    label_names,
    read_tokenizer,
)
from revmux_vllm.training.device import process_state
from revmux_vllm.training.evaluate import Groups, Predict, evaluate
from revmux_vllm.training.exits import load_exits
from revmux_vllm.training.features import extract, tokenize
from revmux_vllm.training.plot import PLOT_FILE, plot_report


def measure(
    folder: Path,
    rows: str,
    *,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    window: int,
    max_tokens: int,
    engine: bool,
    save: bool = False,
) -> dict[str, Any]:
    """The report of a checkpoint on ``rows``, with its early exits.

    Args:
        folder: checkpoint, or a bundled name.
        rows: file or hub data set with labels.
        text_columns, label_column: see ``data.read_rows``.
        window: requests packed together.
        max_tokens: longer rows are cut.
        engine: let vLLM answer, which must be installed.
        save: keep the report in the checkpoint, for servers and for its model card.

    Raises:
        UserError: for a broken checkpoint or unusable rows.
    """
    if engine:
        require("vllm", extra="train")
    for name, value in (("window", window), ("max_tokens", max_tokens)):
        if value < 1:
            raise UserError(f"`{name}`", expected="at least 1", found=value)
    folder = bundled.resolve(folder)
    ladder = checkpoint.load_adapters(folder).float()
    config = ladder.config
    hf_config = AutoConfig.from_pretrained(folder)
    names = label_names(hf_config, config.label_words)
    texts = data.read_rows(
        rows, names, text_columns=text_columns, label_column=label_column, need_labels=True
    )
    check_pairs(config, texts, rows)
    check_enough(config, len(texts), window)
    check_max_tokens(hf_config, max_tokens)
    device = process_state().device
    backbone = _load_backbone(folder, config).to(device)
    ladder.to(device)
    tokenizer = read_tokenizer("checkpoint", folder)
    exits = load_exits(folder, hf_config.hidden_size, len(names)).to(device)
    features = extract(backbone, tokenizer, texts, max_tokens, [int(layer) for layer in exits])
    answering: AbstractContextManager[Predict | None] = nullcontext()
    if engine:
        answering = engine_answers(
            folder, tokenize(tokenizer, texts, max_tokens)["input_ids"], window
        )
    with answering as answer:
        report = evaluate(
            backbone, ladder, exits, features, names, window, answer, cascade.load(folder)
        )
    if save:
        keep(folder, config, backbone.num_layers, report)
    return report


def keep(folder: Path, config: RevMuxConfig, num_layers: int, report: dict[str, Any]) -> None:
    """Write a report, and the model card and the plot of it, into a checkpoint folder."""
    front = front_matter(checkpoint.backbone_folder(folder))
    card = model_card(folder.name, front, config, num_layers, report)
    checkpoint.write_card(folder, card, report)
    plot_report(report, folder / PLOT_FILE, folder.name)


def _load_backbone(folder: Path, config: RevMuxConfig) -> Backbone:
    source = checkpoint.backbone_folder(folder)
    try:
        return load_backbone(source, config.prefill_layers, config.label_words)
    except OSError as error:  # named by a hub id that cannot be reached
        problem = f"its backbone {source} cannot be read: {str(error).splitlines()[0]}"
        raise UserError(f"{folder}", problem) from error


@contextmanager
def engine_answers(folder: Path, prompts: list[list[int]], window: int) -> Iterator[Predict]:
    """Probabilities by an engine in place of the reference, from which they must not differ.

    All requests of a window wait together before the first step, so the scheduler packs them as
    ``pack`` does for the reference.

    Args:
        folder: checkpoint to serve.
        prompts: token ids of every row.
        window: most requests that wait together.
    """
    # The one place where this room asks the engine's.
    from revmux_vllm.engine.in_process import InProcessEngine

    longest = max(map(len, prompts))
    engine = InProcessEngine(
        folder,
        dtype="float32",  # as the reference computes
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=window,
        max_num_batched_tokens=window * longest,
    )

    def probabilities(rung: Rung, groups: Groups, parts: Sequence[Any]) -> Tensor:
        engine.run_at(rung)
        answers: list[Tensor] = [torch.empty(0)] * len(prompts)
        for rows in parts:
            outputs = engine.classify([prompts[row] for row in rows], logits=True)
            for row, output in zip(rows, outputs, strict=True):
                logits = torch.tensor(output.outputs.probs)[None]
                answers[row] = two_class_logits(logits)[0].softmax(-1)
        return torch.stack(answers)

    try:
        yield probabilities
    finally:
        engine.close()
