"""The speed-up of rungs in arithmetic at some length, attention counted: what an engine's ratio is
held against where texts are long. No weights are read, and no memory is taken for any.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.base import Backbone, LabelWords
from revmux_vllm.backbones.loading import model_class
from revmux_vllm.bench.workload import Model
from revmux_vllm.families import family_of
from revmux_vllm.rungs import Rung
from revmux_vllm.training.cost import Costs


def speedups(model: Model, rungs: Sequence[Rung], num_tokens: int) -> dict[Rung, float]:
    """Of every rung against the backbone, everything counted; see ``Costs``.

    Args:
        model: a checkpoint.
        rungs: of its own, and ``Rung()``.
        num_tokens: of every text.
    """
    backbone = imagined_backbone(model)
    with torch.device("meta"):
        ladder = AdapterLadder(model.config, backbone.hidden_size)
    imagine(ladder)
    costs = Costs(backbone, num_tokens)
    return {
        rung: 1.0 if rung == Rung() else costs.speedup(ladder, rung)
        for rung in dict.fromkeys(rungs)
    }


def imagined_backbone(model: Model) -> Backbone:
    """A checkpoint's backbone, of tensors that have shapes and no values."""
    config = AutoConfig.from_pretrained(model.folder)
    words = model.config.label_words
    with torch.device("meta"):
        whole = model_class(config, words).from_config(config)
    imagine(whole)
    head = LabelWords(whole.lm_head.weight, list(range(len(words)))) if words else None
    cut: type[Backbone] = family_of(config.model_type).load_backbone_class()
    return cut(whole, model.config.prefill_layers, head)


def imagine(module: nn.Module) -> None:
    """Give a module tensors of the CPU that have no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
