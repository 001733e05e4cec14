"""What vLLM offers and RevMUX cannot run with: each is refused by name, with the cure."""

import os
from typing import TYPE_CHECKING

from revmux_vllm.errors import UserError
from revmux_vllm.families import TENSOR_PARALLEL, family_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse_impossible_options(vllm_config: "VllmConfig") -> None:
    """Refuse what cannot work.

    Raises:
        UserError: naming each option as the user typed it, with the cure.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    refused = []
    if model.runner_type != "pooling":
        refused.append(
            f"--runner {model.runner_type}: a RevMUX checkpoint classifies; use --runner pooling "
            "or leave the option out"
        )
    if vllm_config.scheduler_config.enable_chunked_prefill:
        refused.append(
            "--enable-chunked-prefill: a composite needs its members whole; leave the option out"
        )
    if vllm_config.cache_config.enable_prefix_caching:
        refused.append(
            "--enable-prefix-caching: the upper layers' pages belong to a composite, not to a "
            "prompt; leave the option out"
        )
    if parallel.pipeline_parallel_size > 1:
        refused.append(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: the multiplexer sits "
            "between two layers of one worker; use 1, and --data-parallel-size or replicas to "
            "scale out"
        )
    family = family_of(model.hf_config.model_type)
    if parallel.tensor_parallel_size > 1 and (reason := family.refuses.get(TENSOR_PARALLEL)):
        refused.append(f"--tensor-parallel-size {parallel.tensor_parallel_size}: {reason}")
    if vllm_config.lora_config is not None:
        refused.append("--enable-lora: adapters of another kind; leave the option out")
    if vllm_config.speculative_config is not None:
        refused.append("--speculative-config: a classifier decodes nothing; leave the option out")
    read_at = "CLS" if family.pools_first else "LAST"
    pooler = model.pooler_config
    if pooler is not None and pooler.seq_pooling_type not in (None, read_at):
        refused.append(
            f"--pooler-config pooling_type {pooler.seq_pooling_type}: of a composite's member only "
            f"the token that the backbone pools ({read_at}) is known; leave the option out"
        )
    if len(set(getattr(model.hf_config, "layer_types", None) or ())) > 1:
        refused.append(
            "layer_types in config.json: full and sliding attention mixed are not supported; serve "
            "the backbone itself"
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        refused.append("VLLM_USE_V2_MODEL_RUNNER=1: the V1 model runner is needed; unset it")
    if refused:
        raise UserError("RevMUX cannot run with\n  " + "\n  ".join(refused))
