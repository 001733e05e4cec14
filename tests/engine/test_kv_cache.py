"""The cache has room for the steps in flight, by the real blocks and pages, and for no more."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from revmux_vllm.engine.kv_cache import fit_kv_cache, needed_bytes
from revmux_vllm.engine.model_config import RevMuxModelConfig

GIB = 2**30


def configure(folder: Path, max_model_len: int = 8192, **options: Any) -> VllmConfig:
    return EngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=max_model_len,
        hf_overrides={"max_position_embeddings": max_model_len},
        **{"max_num_batched_tokens": 8192, "max_num_seqs": 1024, **options},
    ).create_engine_config()


def specs(block_size: int, layers: int = 32, heads: int = 8, size: int = 128) -> dict[str, Any]:
    """As the model runner gives them; by default those of an 8B LLaMA in bfloat16."""
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=size, dtype=torch.bfloat16
    )
    return {f"model.layers.{i}.self_attn.attn": spec for i in range(layers)}


def vllms_blocks(config: VllmConfig, of: dict[str, KVCacheSpec], num_bytes: int) -> int:
    """How many vLLM makes of them."""
    config.cache_config.kv_cache_layout = "NHD"  # which the workers would settle
    (made,) = get_kv_cache_configs(config, [of], [num_bytes])
    return made.num_blocks


@pytest.mark.parametrize(("block_size", "gib"), [(16, 5.0), (128, 19.0)])
def test_an_8b_shape(tiny_checkpoint: Path, block_size: int, gib: float) -> None:
    """1,024 sequences in steps of 8,192 tokens, each with a block that it fills in part, and what
    stays."""
    config = configure(tiny_checkpoint)
    needed = needed_bytes(config, specs(block_size))
    assert needed / GIB == pytest.approx(gib, rel=0.01)
    blocks = (8192 + 16_384) // block_size + 1024 + 1  # and the null block
    assert vllms_blocks(config, specs(block_size), needed) == blocks


def test_steps_are_as_long_as_plain_vllms_and_the_cache_holds_the_longest_prompt(
    tiny_checkpoint: Path,
) -> None:
    """At 131,072 positions a step stays a step, and a prompt of as many tokens has its pages."""
    options = {"max_num_batched_tokens": None, "max_num_seqs": None}
    ours = configure(tiny_checkpoint, 131_072, **options)
    plain = configure(tiny_checkpoint.parent / "backbone", 131_072, **options)
    assert ours.scheduler_config.max_num_batched_tokens == 2048
    for name in ("max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill"):
        assert getattr(ours.scheduler_config, name) == getattr(plain.scheduler_config, name), name
    of = specs(16)
    assert vllms_blocks(ours, of, needed_bytes(ours, of)) == (131_072 + 16_384) // 16 + 1


def test_steps_that_overlap_have_each_their_own_room(tiny_checkpoint: Path) -> None:
    config = configure(tiny_checkpoint)
    config.scheduler_config.async_scheduling = True  # which the CPU's platform turns off
    assert (
        vllms_blocks(config, specs(16), needed_bytes(config, specs(16))) == 1024 + 1024 + 1024 + 1
    )


def test_the_hook_sets_a_bound_and_the_worker_what_is_needed(tiny_checkpoint: Path) -> None:
    config = configure(tiny_checkpoint)
    bound = config.cache_config.kv_cache_memory_bytes
    hf_config = config.model_config.hf_config
    for block_size in (16, 32):
        of = specs(block_size, hf_config.num_hidden_layers, hf_config.num_key_value_heads, 32)
        in_worker = pickle.loads(pickle.dumps(config))
        fit_kv_cache(in_worker, of)
        assert in_worker.cache_config.kv_cache_memory_bytes == needed_bytes(config, of) <= bound


def test_a_size_of_the_users_own_stays(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tiny_checkpoint, kv_cache_memory_bytes=64 << 20)
    fit_kv_cache(config, specs(16))
    assert config.cache_config.kv_cache_memory_bytes == 64 << 20
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    config = configure(tiny_checkpoint)
    fit_kv_cache(config, specs(16))
    assert config.cache_config.kv_cache_memory_bytes == 2 * GIB


def test_asynchronous_scheduling_is_the_users_choice(tiny_checkpoint: Path) -> None:
    """The hook leaves it as it finds it, and has room for two steps where it is on."""
    config = configure(tiny_checkpoint)
    bounds = []
    for asked in (None, False, True):
        config.scheduler_config.async_scheduling = asked
        config.cache_config.kv_cache_memory_bytes = None
        RevMuxModelConfig.verify_and_update_config(config)
        assert config.scheduler_config.async_scheduling is asked
        bounds.append(config.cache_config.kv_cache_memory_bytes)
    assert bounds[0] == bounds[1]
    assert bounds[2] - bounds[1] == 8192 * 4 * 2 * 32 * 4  # layers, keys and values, size, bytes
