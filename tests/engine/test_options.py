"""Options that cannot work are refused by name before any engine process starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_checkpoint
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import EngineArgs


def configure(model: Path, **options: Any) -> Any:
    return EngineArgs(model=str(model), dtype="float32", **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_chunked_prefill": True}, "--enable-chunked-prefill"),
        ({"enable_prefix_caching": True}, "--enable-prefix-caching"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"runner": "generate"}, "--runner generate"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"pooler_config": PoolerConfig(pooling_type="MEAN")}, "--pooler-config pooling_type MEAN"),
        ({"additional_config": {"revmux": None}}, "--additional-config revmux: expected an object"),
    ],
)
def test_refused_by_name_with_the_cure(
    tiny_checkpoint: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        configure(tiny_checkpoint, **options)


def test_roberta_takes_as_many_tokens_as_it_has_positions_for(tmp_path: Path) -> None:
    """They count from behind its padding token, so a prompt of 520 would end the engine."""
    config = configure(make_tiny_checkpoint(tmp_path, family="roberta"))
    assert config.model_config.hf_config.max_position_embeddings == 520
    assert config.model_config.max_model_len == 519
    assert config.scheduler_config.max_model_len == 519


def test_t5_is_not_served_in_float16_nor_by_two_processes(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, family="t5", label_words=("w8", "w7"))
    with pytest.raises(ValueError, match="--tensor-parallel-size 2: transformers' T5"):
        configure(folder, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="T5 overflows in float16"):
        EngineArgs(model=str(folder), dtype="float16").create_engine_config()
    chosen = EngineArgs(model=str(folder)).create_engine_config().model_config.dtype
    assert chosen == torch.bfloat16


def test_layers_of_several_kinds_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, family="qwen3")
    values = json.loads((folder / "config.json").read_text())
    values["layer_types"][0] = "sliding_attention"
    (folder / "config.json").write_text(json.dumps(values | {"sliding_window": 8}))
    with pytest.raises(ValueError, match="full and sliding attention mixed"):
        configure(folder)


def test_no_flags_are_needed(tiny_checkpoint: Path) -> None:
    config = configure(tiny_checkpoint)
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.get_scheduler_cls().__name__ == "RevMuxScheduler"
    assert config.parallel_config.worker_cls.endswith("RevMuxWorker")
    assert not config.use_v2_model_runner, "engine/model_config.py chooses V1 by environment"
    assert 0 < config.cache_config.kv_cache_memory_bytes < 1 << 30


def test_a_broken_checkpoint_is_refused_before_the_engine_starts(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    values = json.loads((folder / "config.json").read_text())
    values["revmux"]["rungs"] = ["mux:2", "mux:3"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"revmux\.rungs: mux:3: 3 does not divide"):
        configure(folder)
