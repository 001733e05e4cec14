"""How much room keys and values need: that of the steps in flight, and of prefixes that stay.

vLLM settles blocks and pages in the worker, where it knows the attention backend. The hook, which
runs long before, sets a bound, so that vLLM neither takes a share of all memory nor starts beside
too little of it; the worker replaces the bound by what is needed.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv

from revmux_vllm.families import family_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.revmux")

PREFIX_TOKENS = 1 << 14
"""Of prefixes that stay in the cache between steps, beside what the last steps have left there."""
CPU_BLOCK = 32
"""Tokens of a block on CPUs where prefixes are shared, the fewest that their kernels take. vLLM's
own 128 would round most of a prefix off, and four times as much where four tokens become a row."""
LARGEST_BLOCK = 128
"""Tokens of the largest block that vLLM chooses by itself (platforms/cpu.py)."""
_OURS = "revmux_sized"
"""Attribute of vLLM's ``CacheConfig``: its size is the hook's and not the user's."""


def size_kv_cache(vllm_config: "VllmConfig") -> None:
    """Bound the cache by what is needed with the largest blocks, unless the user sized it.

    Without it vLLM takes a share of all memory (0.92 of a NUMA node on CPUs) and refuses to start
    beside anything else.
    """
    cache, model, parallel = (
        vllm_config.cache_config,
        vllm_config.model_config,
        vllm_config.parallel_config,
    )
    if cache.kv_cache_memory_bytes is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    setattr(cache, _OURS, True)
    if not family_of(model.hf_config.model_type).has_kv_cache:
        cache.kv_cache_memory_bytes = 1 << 20  # there is none, but vLLM would look for room
        return
    block_size = cache.block_size if cache.user_specified_block_size else LARGEST_BLOCK
    # vLLM settles this later; only who asks for it gets it, since a classifier has none by default.
    steps = 2 if vllm_config.scheduler_config.async_scheduling else 1
    heads, layers = model.get_num_kv_heads(parallel), model.get_num_layers(parallel)
    token_bytes = 2 * heads * model.get_head_size() * model.dtype.itemsize
    blocks = _blocks(vllm_config, block_size, steps)
    cache.kv_cache_memory_bytes = blocks * layers * block_size * token_bytes


def choose_block_size(vllm_config: "VllmConfig") -> None:
    """Small blocks on CPUs where prefixes are shared; the user's choice stays."""
    cache = vllm_config.cache_config
    if (
        current_platform.is_cpu()
        and cache.enable_prefix_caching
        and not cache.user_specified_block_size
    ):
        cache.block_size, cache.user_specified_block_size = CPU_BLOCK, True


def fit_kv_cache(vllm_config: "VllmConfig", specs: Mapping[str, Any]) -> None:
    """In the worker: the hook's bound becomes what is needed. A size of the user's own stays.

    Args:
        vllm_config: its cache config is set.
        specs: vLLM's ``KVCacheSpec`` of every layer by name, as the model runner gives them.
    """
    cache = vllm_config.cache_config
    if specs and getattr(cache, _OURS, False):
        cache.kv_cache_memory_bytes = needed_bytes(vllm_config, specs)
        logger.info(
            "RevMUX: KV cache of %.0f MiB, for %d tokens of at most %d sequences, or %d of one",
            cache.kv_cache_memory_bytes / 2**20,
            vllm_config.max_in_flight_tokens,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )


def needed_bytes(vllm_config: "VllmConfig", specs: Mapping[str, Any]) -> int:
    """Bytes of all pages that the steps in flight can use, by the layers' own blocks and pages."""
    steps = vllm_config.max_concurrent_batches
    return sum(
        _blocks(vllm_config, spec.block_size, steps) * spec.page_size_bytes
        for spec in specs.values()
    )


def _blocks(vllm_config: "VllmConfig", block_size: int, steps: int) -> int:
    """For so many steps in flight, or for the longest prompt, which runs by itself."""
    scheduler = vllm_config.scheduler_config
    # Every sequence can leave its last block almost empty.
    full_steps = cdiv(steps * scheduler.max_num_batched_tokens, block_size) + scheduler.max_num_seqs
    longest = cdiv(vllm_config.model_config.max_model_len, block_size)
    kept = vllm_config.cache_config.enable_prefix_caching * cdiv(PREFIX_TOKENS, block_size)
    return max(full_steps, longest) + kept + 1  # and one is vLLM's null block
