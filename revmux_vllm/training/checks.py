"""What cannot work is refused here, before anything is computed and before anything is written."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import check_family, most_positions
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError, within
from revmux_vllm.families import FAMILIES
from revmux_vllm.problems import Problem, problem_of
from revmux_vllm.prompts import check_template
from revmux_vllm.training import data
from revmux_vllm.training.device import on_cpu, process_state
from revmux_vllm.training.evaluate import WINDOW
from revmux_vllm.training.features import tokenize
from revmux_vllm.training.labels import is_blank
from revmux_vllm.training.options import TrainOptions
from revmux_vllm.training.recipes import PAPER_RUNGS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A training that can work.

    Attributes:
        options: settled for its backbone.
        config: of the checkpoint.
        hf_config: the backbone's, of transformers.
        tokenizer: the backbone's.
        names: of the classes, in order.
        problem: what the backbone's answers mean.
        rows: to train on.
        held_out: to choose the best of the checkpoints and the thresholds on, or None.
        measured: to measure the result on, or None.
        commit: of a backbone of the hub.
    """

    options: TrainOptions
    config: RevMuxConfig
    hf_config: Any
    tokenizer: Any
    names: list[str]
    problem: Problem
    rows: data.LabelledText
    held_out: data.LabelledText | None
    measured: data.LabelledText | None
    commit: str | None = None


class Classes(NamedTuple):
    """What labels are read as.

    Attributes:
        names: in order.
        are_ours: see ``names_are_ours``.
        problem: of the backbone.
    """

    names: list[str]
    are_ours: bool
    problem: Problem


def check(options: TrainOptions) -> Task:
    """Read what a training needs, except the backbone's weights.

    Raises:
        UserError: for everything that cannot work.
    """
    checkpoint.check_output(options.output, options.backbone, options.bundle_backbone)
    hf_config = read_backbone_config(options.backbone)
    with within(f"`backbone` {options.backbone}"):
        check_family(hf_config, options.label_words)
        _check_problem(hf_config, options.label_words)
    check_max_tokens(hf_config, options.max_tokens)
    if options.bf16 and not (on_cpu() or is_torch_bf16_gpu_available()):
        raise UserError("`bf16`", "this machine's GPU has no bfloat16", cure="leave it out")
    tokenizer = read_tokenizer("`backbone`", options.backbone)
    if options.recipe.paper_loss:  # the paper cuts at half depth
        options = options.settled(max(1, hf_config.num_hidden_layers // 2), PAPER_RUNGS)
    options.config().check_backbone(hf_config.hidden_size, hf_config.num_hidden_layers)
    names = label_names(hf_config, options.label_words)
    problem = problem_of(hf_config, options.label_words)
    classes = Classes(names, names_are_ours(hf_config, options.label_words), problem)
    rows = _rows_to_train_on(options, classes)
    config = options.config(rows.pairs)
    if config.score_template is not None:
        if not rows.pairs:
            cure = "name the columns of both with `text_columns`"
            raise UserError("`score_template`", "the rows are single texts", cure=cure)
        check_template(config.score_template)  # before anything is computed
    measured = _rows_to_measure(options, config, classes, tokenizer)
    rows, held_out = _split(options, config, classes, rows)
    _check_shares(options, config, len(rows), len(held_out or ()))
    return Task(options, config, hf_config, tokenizer, names, problem, rows, held_out, measured)


def read_backbone_config(backbone: str) -> Any:
    """The config of a folder or hub id; UserError naming ``backbone`` if there is none."""
    if Path(backbone).is_file():
        raise UserError("`backbone`", "expected a folder or hub id, found a file", found=backbone)
    _check_merged(backbone)
    try:
        hf_config = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise UserError(
            "`backbone`",
            "neither a folder with a config.json nor a model of the hub that can be reached, of a "
            f"family that is supported ({', '.join(FAMILIES)}): {str(error).splitlines()[0]}",
            found=backbone,
        ) from error
    if hasattr(hf_config, "revmux"):
        cure = "give the classifier that it was trained on"
        raise UserError("`backbone`", "that is a RevMUX checkpoint", found=backbone, cure=cure)
    return hf_config


def _check_merged(backbone: str) -> None:
    """Raise UserError for a folder of PEFT's, which holds the difference to a model alone."""
    path = Path(backbone) / "adapter_config.json"
    if not path.is_file():
        return
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    raise UserError(
        "`backbone`",
        f"a PEFT adapter over {base}, not a whole model",
        found=backbone,
        cure="merge it: AutoPeftModelForSequenceClassification.from_pretrained(FOLDER)"
        ".merge_and_unload().save_pretrained(MERGED), and the tokenizer beside it",
    )


def read_tokenizer(what: str, folder: str | Path) -> Any:
    """The tokenizer of a folder or hub id; UserError naming it as ``what`` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        cure = f"save it there with tokenizer.save_pretrained({str(folder)!r})"
        raise UserError(f"{what} {folder}", "its tokenizer cannot be read", cure=cure) from error


def label_names(hf_config: Any, label_words: Sequence[str] | None) -> list[str]:
    """Classes of a backbone in order, as a data file may name them."""
    if label_words:
        return [word.strip() for word in label_words]
    problem = problem_of(hf_config)
    if hf_config.num_labels == 1 and problem is Problem.ONE_CLASS:  # does it fit or not
        return ["no", "yes"]
    return [str(hf_config.id2label[i]) for i in range(hf_config.num_labels)]


def names_are_ours(hf_config: Any, label_words: Sequence[str] | None) -> bool:
    """Whether ``label_names`` are label words, or no and yes: none that a data set need know."""
    return bool(label_words) or hf_config.num_labels == 1


def check_max_tokens(hf_config: Any, max_tokens: int) -> None:
    """Raise UserError where texts may have more tokens than the backbone has positions."""
    positions = most_positions(hf_config)
    if positions is not None and max_tokens > positions:
        problem = f"the backbone takes {positions} at most"
        raise UserError("`max_tokens`", problem, found=max_tokens)


def check_pairs(config: RevMuxConfig, rows: data.LabelledText, source: str) -> None:
    """Raise UserError where pairs meet adapters for single texts, or the other way round."""
    kinds = {True: "pairs of texts", False: "single texts"}
    if rows.pairs != config.pairs:
        problem = f"{kinds[rows.pairs]}, but the adapters are trained on {kinds[config.pairs]}"
        raise UserError(source, problem, cure="name the columns with `text_columns`")


def check_enough(config: RevMuxConfig, count: int, window: int) -> None:
    """Raise UserError where rows, or those that wait together, are too few for a composite."""
    widest = max(rung.mux for rung in config.rungs)
    if min(count, window) < widest:
        raise UserError(
            f"{count} rows, {window} at a time, never fill a composite of {widest}",
            cure=f"measure on at least {widest} rows, with `window` {widest} or more",
        )


def _check_problem(hf_config: Any, label_words: Sequence[str] | None) -> None:
    named = hf_config.problem_type
    if not label_words and named not in (None, *Problem):
        raise UserError(f"problem_type {named!r}", expected=f"one of {', '.join(Problem)}")


def _rows_to_train_on(options: TrainOptions, classes: Classes) -> data.LabelledText:
    rows = _read_rows(options, options.train, classes)
    if all(map(is_blank, rows.labels)):
        logger.warning(
            "%s: no column of labels, so the adapters learn from the backbone alone; if there is "
            "one, name it in `label_column`",
            options.train,
        )
    return rows


def _rows_to_measure(
    options: TrainOptions,
    config: RevMuxConfig,
    classes: Classes,
    tokenizer: Any,
) -> data.LabelledText | None:
    if options.eval is None:
        return None
    rows = _read_rows(options, options.eval, classes, need_labels=True)
    check_pairs(config, rows, options.eval)
    check_enough(config, len(rows), WINDOW)
    # What cannot be measured is no use trained.
    tokenize(tokenizer, rows, options.max_tokens, options.score_template)
    return rows


def _read_rows(
    options: TrainOptions,
    source: str,
    classes: Classes,
    need_labels: bool = False,
) -> data.LabelledText:
    return data.read_rows(
        source,
        classes.names,
        text_columns=options.text_columns,
        label_column=options.label_column,
        need_labels=need_labels,
        words=classes.are_ours,
        problem=classes.problem,
    )


def _split(
    options: TrainOptions,
    config: RevMuxConfig,
    classes: Classes,
    rows: data.LabelledText,
) -> tuple[data.LabelledText, data.LabelledText | None]:
    """Rows to train on, and those to choose on: a file of their own, or a share, or none."""
    if options.validation is not None:
        held_out = _read_rows(options, options.validation, classes)
        check_pairs(config, held_out, options.validation)
        return rows, held_out
    kept, held = data.split_rows(len(rows), options.hold_out, options.seed)
    return rows.select(kept), rows.select(held) if held else None


def _check_shares(
    options: TrainOptions, config: RevMuxConfig, num_kept: int, num_held: int
) -> None:
    """Every process must fill composites of every width, in training and while it is held out."""
    processes = process_state().num_processes
    widest = max(rung.mux for rung in config.rungs)
    share = num_held // processes
    if num_held and share < widest:
        raise UserError(
            "`hold_out`" if options.validation is None else "`validation`",
            f"{share} rows a process, fewer than the widest width {widest}",
            found=options.hold_out if options.validation is None else options.validation,
            cure="give more rows, or `hold_out` 0",
        )
    batch_size = options.recipe.batch_size
    if batch_size < widest or num_kept < batch_size * processes:
        raise UserError(
            "`batch_size`",
            expected=f"at least the widest width {widest}, and in all processes together at most "
            f"the {num_kept} training rows",
            found=batch_size,
        )
