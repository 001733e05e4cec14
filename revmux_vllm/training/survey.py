"""Where a task's knowledge appears: an early exit after every layer, tried on a sample of the rows.

Exits are quick to train and say what each depth already knows. Fewer rows are worth having from
where the knowledge is about to appear (the cut) until a little after it has (the stops).
"""

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.base import Backbone
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.worth import MIN_AGREEMENT
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.training import data, trainer
from revmux_vllm.training.checks import Task
from revmux_vllm.training.evaluate import exit_probabilities
from revmux_vllm.training.exits import make_exits
from revmux_vllm.training.features import extract
from revmux_vllm.training.ladder_model import LadderModel
from revmux_vllm.training.recipes import RECIPES
from revmux_vllm.training.scores import agreement

ROWS = 3000
HELD_OUT = 0.2
"""Share of the sample that measures, where the training holds nothing out."""
RECIPE = replace(RECIPES["default"], epochs=3.0, copies=0.0)
UNKNOWING = 0.85
"""Agreement of an early exit below which a layer does not know the task yet."""
SURE = 0.98
DEEPEST = 2 / 3
"""Share of the layers that is cut off at most: above the cut there must be something to save."""
BAR = 40


class Proposal(NamedTuple):
    """What follows from a survey."""

    prefill_layers: int
    rungs: tuple[Rung, ...]


def survey(task: Task, backbone: Backbone, folder: Path) -> Proposal:
    """Train an exit after every layer on a sample, show what each knows, and propose.

    Args:
        task: whose cut or rungs are open.
        backbone: its cut is changed.
        folder: where the training works; it is removed.
    """
    set_seed(task.options.seed)
    rows, measured = _sample(task)
    layers = list(range(1, backbone.num_layers))
    backbone.prefill_layers = 1
    config = RevMuxConfig((Rung(exit=True),), 1, pairs=task.config.pairs)
    exits = make_exits(
        layers, backbone.hidden_size, task.options.adapter_hidden_size, len(task.names)
    )
    ladder = AdapterLadder(config, backbone.hidden_size)
    own, other = (
        extract(
            backbone,
            task.tokenizer,
            part,
            task.options.max_tokens,
            layers,
            folder,
            task.config.score_template,
        )
        for part in (rows, measured)
    )
    options = replace(task.options, recipe=RECIPE)
    shutil.rmtree(folder, ignore_errors=True)
    trainer.train(LadderModel(backbone, ladder, exits, False), own, None, folder, options)
    shutil.rmtree(folder, ignore_errors=True)
    given, own_answers = exit_probabilities(exits, other, backbone.problem), other.logits
    agreements = [
        agreement(given[:, place], own_answers, backbone.problem) for place in range(len(layers))
    ]
    proposed = [propose(agreements)]
    broadcast_object_list(proposed)  # other processes count on other devices
    Console(stderr=True).print(table(agreements, proposed[0]))
    return proposed[0]


def propose(agreements: Sequence[float]) -> Proposal:
    """Cut and rungs.

    Args:
        agreements: with the backbone, of an early exit after each layer but the last.
    """
    layers = len(agreements) + 1
    known = list(accumulate(agreements, max))  # what is known stays known

    def first(level: float) -> int:
        return next((at for at, share in enumerate(known, 1) if share >= level), layers)

    cut = min(max(1, first(UNKNOWING) - 1), max(1, math.floor(DEEPEST * layers)))
    good, sure = first(MIN_AGREEMENT), first(SURE)
    exits = {f"exit@{stop}" if stop > cut else "exit" for stop in (good, sure) if stop < layers}
    names = ["mux:2", "merge:2", "merge:4", *exits]
    stop = good + math.ceil(layers / 15)  # merged rows know later what single ones know
    if cut < stop < layers:
        names += [f"merge:2@{stop}", f"merge:4@{stop}"]
    return Proposal(cut, parse_rungs(names))


def table(agreements: Sequence[float], proposal: Proposal) -> Table:
    """What each layer knows, with the proposal as its title."""
    rungs = ",".join(map(str, proposal.rungs))
    drawn = Table(
        "after layer",
        "agreement",
        "early exits on a sample of the rows",
        title=f"--prefill-layers {proposal.prefill_layers} --rungs {rungs}",
        title_justify="left",
    )
    stops = {rung.stop for rung in proposal.rungs if rung.stop}
    for layer, share in enumerate(agreements, 1):
        note = " cut" if layer == proposal.prefill_layers else " stop" if layer in stops else ""
        drawn.add_row(str(layer), f"{share:.1%}", "█" * round(BAR * share) + note)
    return drawn


def _sample(task: Task) -> tuple[data.LabelledText, data.LabelledText]:
    """Rows to train on, and rows to measure on."""

    def some(rows: data.LabelledText, count: int) -> data.LabelledText:
        return rows.select(random.Random(task.options.seed).sample(range(len(rows)), count))

    rows = some(task.rows, min(ROWS, len(task.rows)))
    if task.held_out is not None:
        return rows, some(task.held_out, min(ROWS // 3, len(task.held_out)))
    kept, held = data.split_rows(len(rows), HELD_OUT, task.options.seed)
    return rows.select(kept), rows.select(held)
