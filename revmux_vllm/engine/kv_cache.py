"""How much room keys and values need: that of one step, for nothing outlives it."""

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv

from revmux_vllm.families import family_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.revmux")


def size_kv_cache(vllm_config: "VllmConfig") -> None:
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
    if not family_of(model.hf_config.model_type).has_kv_cache:
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
