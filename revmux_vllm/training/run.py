"""One training from start to finish: check everything, extract, train, measure, write."""

import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, set_seed

from revmux_vllm import checkpoint
from revmux_vllm.adapters import AdapterLadder
from revmux_vllm.backbones import FAMILIES, check_family, load_backbone, most_positions
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung
from revmux_vllm.training import data, trainer
from revmux_vllm.training.card import model_card
from revmux_vllm.training.device import process_state
from revmux_vllm.training.evaluate import WINDOW, evaluate
from revmux_vllm.training.exits import exit_layers, make_exits, save_exits
from revmux_vllm.training.features import Features, extract, tokenize
from revmux_vllm.training.losses import UNLABELLED
from revmux_vllm.training.plot import plot_report
from revmux_vllm.training.recipes import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"  # as the backbone's weights are
PLOT_FILE = "accuracy.png"
_KEY = re.compile(r"revmux\.(\w+)")

logger = logging.getLogger(__name__)


def label_names(hf_config: Any, label_words: Sequence[str] | None) -> list[str]:
    """Classes of a backbone in order, as a data file may name them."""
    if label_words:
        return [word.strip() for word in label_words]
    if hf_config.num_labels == 1:  # a cross-encoder: does it fit or not
        return ["no", "yes"]
    return [str(hf_config.id2label[i]) for i in range(hf_config.num_labels)]


def check_pairs(config: RevMuxConfig, rows: data.LabelledText, source: str) -> None:
    """Raise ValueError where pairs meet adapters for single texts, or the other way round."""
    kinds = {True: "pairs of texts", False: "single texts"}
    if rows.pairs != config.pairs:
        raise ValueError(
            f"{source}: {kinds[rows.pairs]}, but the adapters are trained on "
            f"{kinds[config.pairs]}; name the columns with --text-columns"
        )


def check_enough(config: RevMuxConfig, count: int, window: int) -> None:
    """Raise ValueError where rows, or those that wait together, are too few for a composite."""
    widest = max(rung.mux for rung in config.rungs)
    if min(count, window) < widest:
        raise ValueError(
            f"{count} rows, {window} at a time, never fill a composite of {widest}; measure on "
            f"at least {widest} rows, with --window {widest} or more"
        )


def train_checkpoint(
    backbone: str,
    train: str,
    output: Path,
    *,
    evaluation: str | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_words: Sequence[str] | None,
    rungs: tuple[Rung, ...],
    prefill_layers: int | None,
    adapter_type: str,
    adapter_hidden_size: int,
    recipe: Recipe,
    max_tokens: int,
    hold_out: float,
    bundle_backbone: bool,
    store_dtype: str,
    bf16: bool,
    gradient_accumulation: int,
    resume: bool,
    seed: int,
) -> dict[str, Any] | None:
    """Train a ladder and write its folder; what ``revmux train`` does, with its options.

    Returns:
        What was measured, as ``revmux eval --json`` prints it; empty without ``evaluation``. In a
        distributed training None in all processes but the main one.

    Raises:
        ValueError: for what cannot work, before any training starts and before anything is written.
    """
    _check_numbers(recipe, hold_out, max_tokens, gradient_accumulation, store_dtype)
    checkpoint.check_output(output, backbone, bundle_backbone)
    hf_config = read_backbone_config(backbone)
    try:
        check_family(hf_config, label_words)
        _check_task(hf_config, label_words, max_tokens)
    except ValueError as error:
        raise ValueError(f"--backbone {backbone}: {error}") from None
    tokenizer = _read_tokenizer(backbone)
    layers, hidden_size = hf_config.num_hidden_layers, hf_config.hidden_size
    names = label_names(hf_config, label_words)
    columns: dict[str, Any] = {"text_columns": text_columns, "label_column": label_column}
    try:
        config = RevMuxConfig(
            rungs=rungs,
            prefill_layers=prefill_layers if prefill_layers is not None else max(1, layers // 4),
            adapter_type=adapter_type,
            adapter_hidden_size=adapter_hidden_size,
            skip=recipe.skip,
            label_words=tuple(label_words) if label_words else None,
        )
        config.check_backbone(hidden_size, layers)
    except ValueError as error:  # keys of config.json; here they are options
        raise ValueError(_KEY.sub(lambda k: f"--{k[1].replace('_', '-')}", str(error))) from None
    rows = data.read_rows(train, names, **columns)
    if set(rows.labels) == {UNLABELLED}:
        logger.warning(
            "%s: no column of labels, so the adapters learn from the backbone alone; if there is "
            "one, name it with --label-column",
            train,
        )
    config = replace(config, pairs=rows.pairs)
    measured_rows = None
    if evaluation is not None:
        measured_rows = data.read_rows(evaluation, names, **columns, need_labels=True)
        check_pairs(config, measured_rows, evaluation)
        check_enough(config, len(measured_rows), WINDOW)
        tokenize(tokenizer, measured_rows, max_tokens)  # what cannot be measured is no use trained
    kept, held = data.split_rows(len(rows), hold_out, seed)
    state = process_state()
    widest = max(rung.mux for rung in rungs)
    share = len(held) // state.num_processes
    if held and share < widest:
        raise ValueError(
            f"--hold-out {hold_out}: {share} rows a process, fewer than the widest width "
            f"{widest}; give more rows, or --hold-out 0"
        )
    step = recipe.batch_size * state.num_processes
    if recipe.batch_size < widest or len(kept) < step:
        raise ValueError(
            f"--batch-size {recipe.batch_size}: expected at least the widest width {widest}, "
            f"and in all processes together at most the {len(kept)} training rows"
        )
    cut = load_backbone(backbone, config.prefill_layers, label_words).to(state.device)
    work = output / checkpoint.WORK_FOLDER
    options = asdict(recipe) | config.to_dict()
    options |= {"seed": seed, "train": train, "backbone": backbone, "hold_out": hold_out}
    options |= {"max_tokens": max_tokens, "bf16": bf16, "text_columns": text_columns}
    options |= {"label_column": label_column, "gradient_accumulation": gradient_accumulation}
    if state.is_main_process:
        trainer.begin(work, options, resume)
    state.wait_for_everyone()

    set_seed(seed)
    at = exit_layers(config.prefill_layers, layers)

    def features_of(own: data.LabelledText) -> Features:
        return extract(cut, tokenizer, own, max_tokens, at, overflow=work)

    copies = data.spliced_copies(rows.select(kept), recipe.copies, seed)
    features = features_of(rows.select(kept) + copies)
    held_out = features_of(rows.select(held)) if held else None
    set_seed(seed)
    ladder = AdapterLadder(config, hidden_size)
    exits = make_exits(at, hidden_size, config.adapter_hidden_size, len(names))
    trainer.train(
        cut,
        ladder,
        exits,
        features,
        held_out,
        work,
        recipe,
        seed=seed,
        bf16=bf16,
        gradient_accumulation=gradient_accumulation,
    )
    del features
    if not state.is_main_process:
        return None
    own_dtype = hf_config.dtype if hf_config.dtype in DTYPES.values() else torch.float32
    dtype = own_dtype if store_dtype == AUTO else DTYPES[store_dtype]
    for part in (ladder, exits):
        part.to(dtype).float()  # measured as stored

    def card(report: dict[str, Any]) -> str:
        return model_card(output.name, config, layers, report)

    checkpoint.save(
        output, ladder, backbone, card({}), bundle_backbone=bundle_backbone, dtype=dtype
    )
    save_exits(output, exits, config.adapter_hidden_size, dtype)
    (output / PLOT_FILE).unlink(missing_ok=True)
    report: dict[str, Any] = {}
    if measured_rows is not None:
        own = features_of(measured_rows)
        report = evaluate(cut, ladder, exits, own, names)
        checkpoint.write_card(output, card(report), report)
        plot_report(report, output / PLOT_FILE, output.name)
    shutil.move(work / trainer.LOG_FILE, output / "training-log.jsonl")
    shutil.rmtree(work)
    return report


def _check_numbers(
    recipe: Recipe, hold_out: float, max_tokens: int, accumulation: int, store_dtype: str
) -> None:
    problems = []
    if not 0 < recipe.epochs < math.inf:
        problems.append(f"--epochs {recipe.epochs:g}: expected more than 0")
    if not 0 < recipe.learning_rate < math.inf:
        problems.append(f"--learning-rate {recipe.learning_rate:g}: expected more than 0")
    if not 0 <= recipe.copies < math.inf:
        problems.append(f"--augment {recipe.copies:g}: expected at least 0")
    if not 0 <= hold_out < 1:
        problems.append(f"--hold-out {hold_out}: expected a share of the rows, 0 to below 1")
    if max_tokens < 1:
        problems.append(f"--max-tokens {max_tokens}: expected at least 1")
    if accumulation < 1:
        problems.append(f"--gradient-accumulation {accumulation}: expected at least 1")
    if store_dtype not in (AUTO, *DTYPES):
        problems.append(f"--store-dtype {store_dtype}: expected {', '.join((AUTO, *DTYPES))}")
    if problems:
        raise ValueError("\n".join(problems))


def _check_task(hf_config: Any, label_words: Sequence[str] | None, max_tokens: int) -> None:
    check_max_tokens(hf_config, max_tokens)
    if label_words:
        return
    if hf_config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"problem_type {hf_config.problem_type!r}: expected one label per row")


def check_max_tokens(hf_config: Any, max_tokens: int) -> None:
    """Raise ValueError where texts may have more tokens than the backbone has positions."""
    positions = most_positions(hf_config)
    if positions is not None and max_tokens > positions:
        raise ValueError(f"--max-tokens {max_tokens}: the backbone takes {positions} at most")


def read_backbone_config(backbone: str) -> Any:
    """The config of a folder or hub id; ValueError naming ``--backbone`` if there is none."""
    if Path(backbone).is_file():
        raise ValueError(f"--backbone {backbone}: expected a folder or hub id, found a file")
    try:
        hf_config = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--backbone {backbone}: neither a folder with a config.json nor a model of the hub "
            f"that can be reached, of a family that is supported ({', '.join(FAMILIES)}): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if hasattr(hf_config, "revmux"):
        raise ValueError(
            f"--backbone {backbone}: that is a RevMUX checkpoint; give the classifier that it was "
            "trained on"
        )
    return hf_config


def _read_tokenizer(backbone: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--backbone {backbone}: its tokenizer cannot be read; save it there with "
            f"tokenizer.save_pretrained({backbone!r})"
        ) from error


def with_options(recipe: Recipe, **options: Any) -> Recipe:
    """``recipe`` with what the user gave in place of its own; None means not given."""
    return replace(recipe, **{key: value for key, value in options.items() if value is not None})
