"""One training from start to finish: check everything, features, fit, write."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import set_seed

from revmux_vllm import checkpoint, hub
from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.problems import Problem
from revmux_vllm.training import cascade, data, trainer, work
from revmux_vllm.training.card import front_matter, model_card
from revmux_vllm.training.checks import Task, check
from revmux_vllm.training.device import backbone_dtype, process_state
from revmux_vllm.training.evaluate import evaluate, exit_probabilities
from revmux_vllm.training.exits import exit_layers, make_exits, save_exits
from revmux_vllm.training.features import Features, extract
from revmux_vllm.training.ladder_model import LadderModel
from revmux_vllm.training.matching import match_composites
from revmux_vllm.training.options import AUTO, STORE_DTYPES, TrainOptions
from revmux_vllm.training.order import warn_of_another_order
from revmux_vllm.training.plot import PLOT_FILE, plot_report
from revmux_vllm.training.survey import survey


def train_checkpoint(options: TrainOptions, resume: bool = False) -> dict[str, Any] | None:
    """Train a ladder and write its folder; what ``revmux train`` does.

    Args:
        options: of the training.
        resume: continue the unfinished training in ``options.output``.

    Returns:
        What was measured, as ``revmux eval --json`` prints it; empty without ``options.eval``. In a
        distributed training None in all processes but the main one.

    Raises:
        UserError: for what cannot work, before any training starts and before anything is written.
    """
    folder, state = work.folder_in(options.output), process_state()
    task = check(work.resumed(folder, options) if resume else options)
    layers = task.config.prefill_layers
    weights = Path(options.backbone)
    if hub.is_id(options.backbone):  # one commit, whatever is pushed meanwhile
        weights = hub.snapshot(options.backbone)
        task = replace(task, commit=weights.name)
    dtype = backbone_dtype(weights, state.device)
    backbone = load_backbone(weights, layers, options.label_words, dtype).to(state.device)
    if state.is_main_process:
        work.begin(folder, task.options, resume)
    state.wait_for_everyone()
    if not task.options.is_settled:
        task = _settled(task, backbone)
        if state.is_main_process:
            work.note(folder, task.options)
    set_seed(options.seed)
    # No name for the features: they are freed before what was trained is measured.
    trained = fit(task, backbone, *features(task, backbone))
    return write(task, backbone, trained) if state.is_main_process else None


def _settled(task: Task, backbone: Backbone) -> Task:
    """With cut and rungs that a survey proposes; the backbone is cut there."""
    folder = work.folder_in(task.options.output) / "survey"
    options = task.options.settled(*survey(task, backbone, folder))
    config = options.config(task.config.pairs)
    config.check_backbone(backbone.hidden_size, backbone.num_layers)
    backbone.prefill_layers = config.prefill_layers
    return replace(task, options=options, config=config)


def features(task: Task, backbone: Backbone) -> tuple[Features, Features | None]:
    """What the backbone says of the rows to train on, with their copies, and of those held out."""
    copies = data.spliced_copies(task.rows, task.options.recipe.copies, task.options.seed)
    own = _features_of(task, backbone, task.rows + copies)
    warn_of_another_order(own, task.names, task.problem)
    held_out = None if task.held_out is None else _features_of(task, backbone, task.held_out)
    return own, held_out


class Trained(NamedTuple):
    """What a training makes.

    Attributes:
        ladder: the adapters.
        exits: early exits beside them, by layer.
        thresholds: of the cascade of these exits; empty where no rows were held out to choose them.
    """

    ladder: AdapterLadder
    exits: nn.ModuleDict
    thresholds: dict[float, float]


def fit(task: Task, backbone: Backbone, features: Features, held_out: Features | None) -> Trained:
    """The adapters, and the early exits beside them, trained."""
    options, size = task.options, backbone.hidden_size
    set_seed(options.seed)
    ladder = AdapterLadder(task.config, size)
    if not options.recipe.paper_loss:
        match_composites(ladder, backbone, features)
    layers = _exit_layers(task, backbone)
    exits = make_exits(layers, size, options.adapter_hidden_size, len(task.names))
    model = LadderModel(backbone, ladder, exits, options.recipe.paper_loss)
    trainer.train(model, features, held_out, work.folder_in(options.output), options)
    thresholds, problem = {}, backbone.problem
    if held_out is not None and problem is not Problem.VALUES:
        given = exit_probabilities(exits, held_out, problem)
        thresholds = cascade.calibrate(given, problem.read(held_out.logits))
    return Trained(ladder, exits, thresholds)


def write(task: Task, backbone: Backbone, trained: Trained) -> dict[str, Any]:
    """Write the checkpoint folder and measure it as it is stored.

    Returns:
        The report; empty where nothing is to be measured.
    """
    options, output = task.options, task.options.output
    ladder, exits, thresholds = trained
    dtype = _store_dtype(task)
    for part in (ladder, exits):
        part.to(dtype).float()
    front = front_matter(options.backbone)

    def card(report: dict[str, Any]) -> str:
        return model_card(output.name, front, task.config, backbone.num_layers, report)

    checkpoint.save(
        output,
        ladder,
        options.backbone,
        card({}),
        bundle_backbone=options.bundle_backbone,
        dtype=dtype,
        revision=task.commit,
    )
    save_exits(output, exits, options.adapter_hidden_size, dtype)
    cascade.save(output, thresholds)
    (output / PLOT_FILE).unlink(missing_ok=True)
    report: dict[str, Any] = {}
    if task.measured is not None:
        own = _features_of(task, backbone, task.measured, mixed=False)
        report = evaluate(backbone, ladder, exits, own, task.names, thresholds=thresholds)
        checkpoint.write_card(output, card(report), report)
        plot_report(report, output / PLOT_FILE, output.name)
    work.end(work.folder_in(output), options)
    return report


def _exit_layers(task: Task, backbone: Backbone) -> list[int]:
    return exit_layers(task.config, backbone.num_layers)


def _features_of(
    task: Task, backbone: Backbone, rows: data.LabelledText, mixed: bool = True
) -> Features:
    """``mixed``: in the precision of the training; what is measured is always in float32."""
    device = next(backbone.layers[0].parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=task.options.bf16 and mixed):
        return extract(
            backbone,
            task.tokenizer,
            rows,
            task.options.max_tokens,
            _exit_layers(task, backbone),
            overflow=work.folder_in(task.options.output),
            template=task.config.score_template,
        )


def _store_dtype(task: Task) -> torch.dtype:
    named = task.options.store_dtype
    if named != AUTO:
        return getattr(torch, named)
    own = task.hf_config.dtype  # of the backbone's weights
    storable = [getattr(torch, name) for name in STORE_DTYPES if name != AUTO]
    return own if own in storable else torch.float32
