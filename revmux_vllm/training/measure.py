"""Measure a checkpoint folder on labelled rows: what ``revmux eval`` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from revmux_vllm import bundled, checkpoint
from revmux_vllm.backbones import load_backbone
from revmux_vllm.training import data
from revmux_vllm.training.device import process_state
from revmux_vllm.training.evaluate import evaluate
from revmux_vllm.training.exits import load_exits
from revmux_vllm.training.features import extract
from revmux_vllm.training.run import check_enough, check_max_tokens, check_pairs, label_names


def measure(
    folder: Path,
    rows: str,
    *,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    window: int,
    max_tokens: int,
    engine: bool,
) -> dict[str, Any]:
    """The report of a checkpoint on ``rows``, with its early exits.

    Args:
        folder: checkpoint, or a bundled name.
        rows: file or hub data set with labels.
        text_columns, label_column: see ``data.read_rows``.
        window: requests packed together.
        max_tokens: longer rows are cut.
        engine: let vLLM answer.

    Raises:
        ValueError: for a broken checkpoint or unusable rows.
    """
    folder = bundled.resolve(folder)
    ladder = checkpoint.load_adapters(folder).float()
    config = ladder.config
    source = checkpoint.backbone_folder(folder)
    hf_config = AutoConfig.from_pretrained(folder)
    names = label_names(hf_config, config.label_words)
    texts = data.read_rows(
        rows, names, text_columns=text_columns, label_column=label_column, need_labels=True
    )
    check_pairs(config, texts, rows)
    if window < 1:
        raise ValueError(f"--window {window}: expected at least 1")
    check_enough(config, len(texts), window)
    if max_tokens < 1:
        raise ValueError(f"--max-tokens {max_tokens}: expected at least 1")
    check_max_tokens(hf_config, max_tokens)
    device = process_state().device
    backbone = load_backbone(source, config.prefill_layers, config.label_words).to(device)
    ladder.to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exits = load_exits(folder, hf_config.hidden_size, len(names)).to(device)
    features = extract(backbone, tokenizer, texts, max_tokens, [int(layer) for layer in exits])
    answer = None
    if engine:
        from revmux_vllm.engine.offline import OfflineEngine

        answer = OfflineEngine(folder, tokenizer, texts, max_tokens, window).classes
    return evaluate(backbone, ladder, exits, features, names, window, answer)
