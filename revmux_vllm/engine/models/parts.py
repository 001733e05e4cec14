"""Small parts of a classifier that more than one family, or the base of all, needs."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import pooler_for_classify

from revmux_vllm import checkpoint
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.options import read_options


def classify_pooler(
    vllm_config: VllmConfig, classifier: Any, pooling: Any = None
) -> DispatchPooler:
    """vLLM's pooler for ``classify``, and for nothing by token: of members one row is known."""
    config = vllm_config.model_config.pooler_config
    assert config is not None
    return DispatchPooler(
        {"classify": pooler_for_classify(config, pooling=pooling, classifier=classifier)}
    )


def adapter_dtype(vllm_config: VllmConfig, config: RevMuxConfig, here: Tensor) -> torch.dtype:
    """What adapters compute in.

    Left to ``auto``, a GPU takes bfloat16, whose tensor cores are many times faster; on a CPU they
    are never narrower than they were trained.

    Args:
        vllm_config: with the user's options.
        config: of the checkpoint.
        here: a tensor of the dtype and device that the backbone is served in.
    """
    chosen = read_options(vllm_config.additional_config, config).adapter_dtype
    if chosen != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[chosen]
    if here.is_cuda:
        return torch.bfloat16 if here.dtype.itemsize == 2 else here.dtype
    if vllm_config.load_config.load_format == "dummy":
        return here.dtype
    stored = checkpoint.adapter_dtype(vllm_config.model_config.model)
    return torch.promote_types(stored, here.dtype)
