"""Measure a checkpoint folder on labelled rows: what ``revmux eval`` does."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from revmux_vllm import bundled, checkpoint
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError, require
from revmux_vllm.planning.contract import Contract
from revmux_vllm.problems import Problem, problem_of
from revmux_vllm.rungs import Rung
from revmux_vllm.training import cascade, data
from revmux_vllm.training import contract as contracts
from revmux_vllm.training.card import front_matter, model_card
from revmux_vllm.training.checks import (
    check_enough,
    check_max_tokens,
    check_pairs,
    label_names,
    names_are_ours,
    read_tokenizer,
)
from revmux_vllm.training.contract import Seen, Terms, observe, stops_of
from revmux_vllm.training.cost import Costs
from revmux_vllm.training.device import backbone_dtype, process_state
from revmux_vllm.training.evaluate import Groups, Predict, evaluate
from revmux_vllm.training.exits import load_exits
from revmux_vllm.training.features import Features, extract, tokenize
from revmux_vllm.training.options import TrainOptions
from revmux_vllm.training.plot import PLOT_FILE, plot_report


def measure(
    folder: Path,
    rows: str,
    *,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    window: int,
    max_tokens: int | None,
    engine: bool,
    save: bool = False,
) -> dict[str, Any]:
    """The report of a checkpoint on ``rows``, with its early exits.

    Args:
        folder: checkpoint, or a bundled name.
        rows: file or hub data set with labels.
        text_columns, label_column: see ``data.read_rows``.
        window: requests packed together.
        max_tokens: longer rows are cut; None: where those of the training were.
        engine: let vLLM answer, which must be installed.
        save: keep the report in the checkpoint, for servers and for its model card.

    Raises:
        UserError: for a broken checkpoint or unusable rows.
    """
    if engine:
        require("vllm", extra="train")
    if window < 1:
        raise UserError("`window`", expected="at least 1", found=window)
    subject = load(
        folder,
        rows,
        text_columns=text_columns,
        label_column=label_column,
        max_tokens=max_tokens,
        window=window,
    )
    answering: AbstractContextManager[Predict | None] = nullcontext()
    if engine:
        template = subject.ladder.config.score_template
        encoded = tokenize(subject.tokenizer, subject.texts, subject.max_tokens, template)
        prompts = encoded["input_ids"]
        answering = engine_answers(subject.folder, prompts, window, subject.backbone.problem)
    with answering as answer:
        report = evaluate(
            subject.backbone,
            subject.ladder,
            subject.exits,
            subject.features,
            subject.names,
            window,
            answer,
            cascade.load(subject.folder),
            checkpoint.read_contracts(subject.folder),
        )
    if save:
        keep(subject.folder, subject.ladder.config, subject.backbone.num_layers, report)
    return report


def calibrate(
    folder: Path,
    rows: str,
    terms: Sequence[Terms],
    *,
    text_columns: Sequence[str] | None,
    max_tokens: int | None,
) -> list[Contract]:
    """Calibrate a checkpoint for some promises, on ``rows``, and keep them there.

    Args:
        folder: checkpoint, or a bundled name.
        rows: file or hub data set; labels are not needed.
        terms: of each promise.
        text_columns: see ``data.read_rows``.
        max_tokens: longer rows are cut.

    Raises:
        UserError: for a checkpoint without exits, or rows that are too few.
    """
    subject = load(
        folder, rows, text_columns=text_columns, label_column=None, max_tokens=max_tokens
    )
    if subject.backbone.problem is not Problem.ONE_CLASS:
        problem = f"a contract is about one class per row, this is {subject.backbone.problem}"
        cure = "serve its rungs by what was measured of them: revmux eval --save, min_agreement"
        raise UserError(f"{folder}", problem, cure=cure)
    stops, shares, seen = at_stops(subject)
    found = [contracts.calibrate(seen, stops, shares, own) for own in terms]
    for contract in found:
        checkpoint.write_contract(subject.folder, contract)
    return found


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and what its backbone says of some rows.

    Attributes:
        folder: of the checkpoint.
        names: of the classes.
        exits: early exits to measure; none unless they were asked for.
        max_tokens: longer rows are cut.
    """

    folder: Path
    backbone: Backbone
    ladder: AdapterLadder
    tokenizer: Any
    names: list[str]
    texts: data.LabelledText
    exits: nn.ModuleDict
    features: Features
    max_tokens: int


def load(
    folder: Path,
    rows: str,
    *,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    max_tokens: int | None,
    window: int | None = None,
) -> Subject:
    """Everything that measuring needs.

    Args:
        window: rows that are packed together; None: neither early exits nor labels are needed.

    Raises:
        UserError: for a broken checkpoint or unusable rows.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError("`max_tokens`", expected="at least 1", found=max_tokens)
    folder = bundled.resolve(folder)
    ladder = checkpoint.load_adapters(folder).float()
    config = ladder.config
    hf_config = AutoConfig.from_pretrained(folder)
    max_tokens = max_tokens or config.max_tokens or TrainOptions.max_tokens
    names = label_names(hf_config, config.label_words)
    texts = data.read_rows(
        rows,
        names,
        text_columns=text_columns,
        label_column=label_column,
        need_labels=window is not None,
        words=names_are_ours(hf_config, config.label_words),
        read_labels=window is not None,
        problem=problem_of(hf_config, config.label_words),
    )
    check_pairs(config, texts, rows)
    if window is not None:
        check_enough(config, len(texts), window)
    check_max_tokens(hf_config, max_tokens)
    device = process_state().device
    backbone = _load_backbone(folder, config).to(device)
    ladder.to(device)
    tokenizer = read_tokenizer("checkpoint", folder)
    exits = nn.ModuleDict()
    if window is not None:
        exits = load_exits(folder, hf_config.hidden_size, len(names)).to(device)
    layers, template = [int(layer) for layer in exits], config.score_template
    features = extract(backbone, tokenizer, texts, max_tokens, layers, template=template)
    return Subject(folder, backbone, ladder, tokenizer, names, texts, exits, features, max_tokens)


def at_stops(subject: Subject) -> tuple[list[Rung], list[float], Seen]:
    """The stops of a contract, the share of the work until each, and what they say of the rows."""
    stops = stops_of(subject.ladder)
    costs = Costs(subject.backbone, round(subject.features.lengths.float().mean().item()))
    shares = costs.until_stops([subject.ladder[stop] for stop in stops])
    return stops, shares, observe(subject.backbone, subject.ladder, subject.features, stops)


def keep(folder: Path, config: RevMuxConfig, num_layers: int, report: dict[str, Any]) -> None:
    """Write a report, and the model card and the plot of it, into a checkpoint folder."""
    front = front_matter(checkpoint.named_backbone(folder))
    card = model_card(folder.name, front, config, num_layers, report)
    checkpoint.write_card(folder, card, report)
    plot_report(report, folder / PLOT_FILE, folder.name)


def _load_backbone(folder: Path, config: RevMuxConfig) -> Backbone:
    source = checkpoint.backbone_folder(folder)
    try:
        dtype = backbone_dtype(source, process_state().device)
        return load_backbone(source, config.prefill_layers, config.label_words, dtype)
    except OSError as error:  # named by a hub id that cannot be reached
        problem = f"its backbone {source} cannot be read: {str(error).splitlines()[0]}"
        raise UserError(f"{folder}", problem) from error


@contextmanager
def engine_answers(
    folder: Path, prompts: list[list[int]], window: int, problem: Problem
) -> Iterator[Predict]:
    """Probabilities by an engine in place of the reference, from which they must not differ.

    All requests of a window wait together before the first step, so the scheduler packs them as
    ``pack`` does for the reference.

    Args:
        folder: checkpoint to serve.
        prompts: token ids of every row.
        window: most requests that wait together.
        problem: what the answers mean.
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
        enable_prefix_caching=False,  # partners as ``pack`` chooses them
    )

    def probabilities(rung: Rung, groups: Groups, parts: Sequence[Any]) -> Tensor:
        engine.run_at(rung)
        answers: list[Tensor] = [torch.empty(0)] * len(prompts)
        for rows in parts:
            outputs = engine.classify([prompts[row] for row in rows], logits=True)
            for row, output in zip(rows, outputs, strict=True):
                logits = torch.tensor(output.outputs.probs)[None]
                answers[row] = problem.read(problem.answers(logits))[0]
        return torch.stack(answers)

    try:
        yield probabilities
    finally:
        engine.close()
