"""The engine's scheduler without an engine, to time it and to test it."""

from typing import Any

BLOCK_TOKENS = 16


def lone_scheduler(vllm_config: Any, num_blocks: int) -> Any:
    """A ``RevMuxScheduler`` with pages for ``num_blocks * BLOCK_TOKENS`` tokens and no worker.

    Args:
        vllm_config: of a RevMUX checkpoint; its ``num_gpu_blocks`` is set.
        num_blocks: one of them is vLLM's null page.
    """
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from revmux_vllm.engine.scheduler import RevMuxScheduler

    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, head_size_v=8, dtype=torch.float32
    )
    return RevMuxScheduler(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_TOKENS,
        log_stats=True,
    )
