"""Options that cannot work are refused by name before any engine process starts."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_checkpoint
from vllm.config import ECTransferConfig, KVTransferConfig, PoolerConfig
from vllm.engine.arg_utils import EngineArgs

from revmux_vllm import checkpoint
from revmux_vllm.engine import version
from revmux_vllm.engine.model_config import RevMuxModelConfig, served_options


def configure(model: Path, **options: Any) -> Any:
    return EngineArgs(model=str(model), dtype="float32", **options).create_engine_config()


class Scheduler:
    """Somebody else's."""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"runner": "generate"}, "--runner generate"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"pooler_config": PoolerConfig(pooling_type="MEAN")}, "--pooler-config pooling_type MEAN"),
        ({"additional_config": {"revmux": None}}, "--additional-config revmux: expected an object"),
        (
            {"kv_transfer_config": KVTransferConfig("ExampleConnector", kv_role="kv_both")},
            "--kv-transfer-config ExampleConnector",
        ),
        ({"kv_offloading_size": 0.5}, "--kv-offloading-size 0.5"),
        (
            {"ec_transfer_config": ECTransferConfig("ECExampleConnector", ec_role="ec_both")},
            "--ec-transfer-config ECExampleConnector",
        ),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"ubatch_size": 2}, "--ubatch-size 2"),
        (
            {"compilation_config": {"use_inductor_graph_partition": True}},
            "-cc.use_inductor_graph_partition",
        ),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "--decode-context-parallel-size 2",
        ),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
        ({"long_prefill_token_threshold": 64}, "--long-prefill-token-threshold 64"),
        ({"scheduler_cls": "mine.Scheduler"}, "--scheduler-cls mine.Scheduler"),
        ({"scheduler_cls": Scheduler}, "--scheduler-cls .*test_options.Scheduler"),
        ({"worker_cls": "mine.Worker"}, "--worker-cls mine.Worker"),
    ],
)
def test_refused_by_name_with_the_cure(
    tiny_checkpoint: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        configure(tiny_checkpoint, **options)


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_what_must_run_whole_is_not_cut(tmp_path: Path, family: str) -> None:
    words = ("w8", "w7", "w6") if family == "t5" else None
    folder = make_tiny_checkpoint(tmp_path, family=family, label_words=words)
    with pytest.raises(ValueError, match=rf"--enable-chunked-prefill: every token of a {family}"):
        configure(folder, enable_chunked_prefill=True)
    with pytest.raises(ValueError, match=rf"--enable-prefix-caching: {family} keeps no"):
        configure(folder, enable_prefix_caching=True)


def test_what_the_hook_sets_itself_is_not_refused(tiny_checkpoint: Path) -> None:
    """Nor is what an earlier run of it has set, nor vLLM's own scheduler named at length."""
    config = configure(tiny_checkpoint, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    RevMuxModelConfig.verify_and_update_config(config)
    assert config.scheduler_config.get_scheduler_cls().__name__ == "RevMuxScheduler"


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What RevMUX warns of; vLLM's loggers hand nothing on to pytest's."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.revmux")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def test_another_vllm_is_warned_of_once_and_by_one_process(
    tiny_checkpoint: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tiny_checkpoint)
    assert warnings == [], "this vLLM is supported"
    monkeypatch.setattr(version, "SUPPORTED_VLLM", "0.3")
    for rank in (0, 1):
        configure(tiny_checkpoint, _api_process_count=2, _api_process_rank=rank)
    assert warnings == [], "their parent warns"
    configure(tiny_checkpoint, _api_process_count=2, _api_process_rank=-1)
    configure(tiny_checkpoint)
    assert len(warnings) == 1, warnings
    assert re.search(r"vLLM 0\.32\.\d+, .* made for 0\.3;.* vllm==0\.3\.\*", warnings[0])


def test_roberta_takes_as_many_tokens_as_it_has_positions_for(tmp_path: Path) -> None:
    """They count from behind its padding token, so a prompt of 520 would end the engine."""
    config = configure(make_tiny_checkpoint(tmp_path, family="roberta"))
    assert config.model_config.hf_config.max_position_embeddings == 520
    assert config.model_config.max_model_len == 519
    assert config.scheduler_config.max_model_len == 519


@pytest.mark.parametrize(
    ("family", "name", "words"), [("t5", "T5", ("w8", "w7")), ("deberta-v2", "DeBERTa", None)]
)
def test_what_is_not_vllms_is_not_served_in_float16_nor_by_two_processes(
    family: str, name: str, words: Any, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path, family=family, label_words=words)
    with pytest.raises(ValueError, match=f"--tensor-parallel-size 2: transformers' {name}"):
        configure(folder, tensor_parallel_size=2)
    with pytest.raises(ValueError, match=f"{name} (may overflow|overflows) in float16"):
        EngineArgs(model=str(folder), dtype="float16").create_engine_config()
    chosen = EngineArgs(model=str(folder)).create_engine_config().model_config.dtype
    assert chosen == torch.bfloat16


def test_modernbert_is_not_served_by_two_processes(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, family="modernbert")
    assert len(set(configure(folder).model_config.hf_config.layer_types)) == 2
    with pytest.raises(ValueError, match="--tensor-parallel-size 2: vLLM's ModernBERT"):
        configure(folder, tensor_parallel_size=2)


def test_layers_with_and_without_a_window_have_one_table_of_blocks(tmp_path: Path) -> None:
    """And so prefixes that stay in the cache, which vLLM keeps no blocks of behind a window."""
    mixed = make_tiny_checkpoint(tmp_path / "mixed", family="gemma3_text")
    config = configure(mixed)
    assert config.scheduler_config.disable_hybrid_kv_cache_manager
    assert config.cache_config.enable_prefix_caching
    with pytest.raises(ValueError, match="--no-disable-hybrid-kv-cache-manager: composites"):
        configure(mixed, disable_hybrid_kv_cache_manager=False)
    same = make_tiny_checkpoint(tmp_path / "same", family="mistral")
    for options in ({}, {"disable_hybrid_kv_cache_manager": False}):
        assert not configure(same, **options).cache_config.enable_prefix_caching


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, family="qwen3")
    values = json.loads((folder / "config.json").read_text())
    values["layer_types"][0] = "chunked_attention"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"layer_types in config\.json: no chunked_attention in a qwen3"
    ):
        configure(folder)


def test_no_flags_are_needed(tiny_checkpoint: Path) -> None:
    """A decoder takes steps as long as plain vLLM's, and shares prefixes unless told otherwise."""
    for options in ({}, {"enable_prefix_caching": True}, {"enable_prefix_caching": False}):
        config = configure(tiny_checkpoint, **options)
        assert config.scheduler_config.enable_chunked_prefill
        cache = config.cache_config
        assert cache.enable_prefix_caching is options.get("enable_prefix_caching", True)
        assert cache.block_size == (32 if cache.enable_prefix_caching else 128)
        assert config.scheduler_config.get_scheduler_cls().__name__ == "RevMuxScheduler"
        assert config.parallel_config.worker_cls.endswith("RevMuxWorker")
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


def test_a_server_uses_what_was_measured_to_be_worth_it(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, rungs="mux:2,mux:4,merge:2@2,exit")

    def used(**options: Any) -> list[str]:
        return [str(rung) for rung in served_options(configure(folder, **options)).rungs]

    whatever = {"additional_config": {"revmux": {"min_agreement": 0}}}
    everything = ["mux:2", "mux:4", "merge:2@2"]
    assert used() == [], "never measured, so alone"
    assert used(**whatever) == everything
    assert used(load_format="dummy") == everything
    rows = {"mux:2": (1.5, 0.9), "mux:4": (2.1, 0.97), "merge:2@2": (3.0, 0.96), "exit": (4, 0.8)}
    report = {
        "rungs": {
            name: {
                "speedup": speedup,
                "agreement": {"mean": agreement},
                "probabilities": {"distance_mean": 0.02},
            }
            for name, (speedup, agreement) in rows.items()
        }
    }
    (folder / checkpoint.REPORT_FILE).write_text(json.dumps(report))
    assert used() == ["mux:4", "merge:2@2"]
    assert used(**whatever) == everything
    assert used(additional_config={"revmux": {"min_agreement": 0.7}})[0] == "exit"
