"""vLLM's config hook for our architectures: choose scheduler and worker, refuse what cannot work.

vLLM calls it once per process with the whole ``VllmConfig`` (config/vllm.py,
``try_verify_and_update_config``), before any engine process starts. Our model class declares
``attn_type = "encoder_only"``, because like an encoder's sequence a composite must run whole; so
vLLM leaves chunked prefill and prefix caching off by default, and if one is on here the user
asked for it.
"""

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils.math_utils import cdiv

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import most_positions
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.environment import set_for_good
from revmux_vllm.engine.platform import native_dtype
from revmux_vllm.errors import UserError
from revmux_vllm.families import TENSOR_PARALLEL, Family, family_of
from revmux_vllm.planning.options import read_options

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.revmux")


class RevMuxModelConfig(VerifyAndUpdateConfig):
    """Hook of every ``RevMux*ForSequenceClassification``."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Set what multiplexing needs.

        Raises:
            UserError: naming each option that cannot work as the user typed it, with the cure, or
                what is wrong with the checkpoint.
        """
        _refuse_impossible_options(vllm_config)
        read_options(
            vllm_config.additional_config,
            RevMuxConfig.from_dict(vllm_config.model_config.hf_config.revmux),
        )
        if vllm_config.load_config.load_format != "dummy":
            checkpoint.validate(vllm_config.model_config.model)
        # One seam is kept for the V1 model runner; V2 orders requests by itself.
        set_for_good("VLLM_USE_V2_MODEL_RUNNER", "0")
        vllm_config.scheduler_config.scheduler_cls = "revmux_vllm.engine.scheduler.RevMuxScheduler"
        vllm_config.scheduler_config.async_scheduling = False
        vllm_config.parallel_config.worker_cls = "revmux_vllm.engine.worker.RevMuxWorker"
        # Upper layers run on another number of rows than a captured graph was made for.
        from vllm.config import CUDAGraphMode

        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        _cap_length(vllm_config)
        _size_kv_cache(vllm_config)
        if vllm_config.model_config.dtype.itemsize == 2 and native_dtype() == "float32":
            logger.warning(
                "RevMUX: this CPU has no bfloat16 instructions and emulates %s, several times "
                "slower; --dtype float32 is the cure",
                vllm_config.model_config.dtype,
            )


def _refuse_impossible_options(vllm_config: "VllmConfig") -> None:
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
    family = _family(model)
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


def _family(model: "ModelConfig") -> Family:
    return family_of(model.hf_config.model_type)


def _cap_length(vllm_config: "VllmConfig") -> None:
    """No prompt beyond an encoder's table of positions: it would end the engine.

    vLLM does not know where RoBERTa's ends: it looks for ``position_embedding_type``, which
    transformers 5 no longer has.
    """
    model = vllm_config.model_config
    positions = most_positions(model.hf_config)
    if _family(model).pools_first and positions and model.max_model_len > positions:
        model.max_model_len = vllm_config.scheduler_config.max_model_len = positions


def _size_kv_cache(vllm_config: "VllmConfig") -> None:
    """Pages for the tokens of one step, unless the user sized the cache: nothing outlives a step.

    Without it vLLM takes a share of all memory (0.92 of a NUMA node on CPUs) and refuses to start
    beside anything else.
    """
    cache, scheduler, model = (
        vllm_config.cache_config,
        vllm_config.scheduler_config,
        vllm_config.model_config,
    )
    if cache.kv_cache_memory_bytes is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    if not _family(model).has_kv_cache:
        cache.kv_cache_memory_bytes = 1 << 20  # there is none, but vLLM would look for room
        return
    block_size = 128  # the largest that vLLM chooses by itself (platforms/cpu.py)
    if cache.user_specified_block_size:
        block_size = cache.block_size
    # Every sequence can leave its last page almost empty; one page is vLLM's null page.
    tokens = max(scheduler.max_num_batched_tokens, model.max_model_len)
    blocks = cdiv(tokens, block_size) + scheduler.max_num_seqs + 1
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    layers = model.get_num_layers(vllm_config.parallel_config)
    page_bytes = 2 * heads * model.get_head_size() * block_size * model.dtype.itemsize
    cache.kv_cache_memory_bytes = blocks * layers * page_bytes
    logger.info(
        "RevMUX: KV cache of %.0f MiB, for %d tokens of at most %d sequences in one step",
        cache.kv_cache_memory_bytes / 2**20,
        tokens,
        scheduler.max_num_seqs,
    )
