"""What we rely on in vLLM 0.32. A failure here says which file to look at after an upgrade."""

import dataclasses
import inspect
from collections import Counter
from pkgutil import resolve_name

import pytest
import vllm
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.worker.worker_base import WorkerBase

from revmux_vllm.backbones.base import Backbone
from revmux_vllm.engine import plugin
from revmux_vllm.engine.attention import composite_attention_backend
from revmux_vllm.engine.metrics import put_counts, take_counts
from revmux_vllm.engine.model_config import RevMuxModelConfig
from revmux_vllm.engine.models.base import RevMuxForSequenceClassification
from revmux_vllm.engine.scheduler import RevMuxSchedulerOutput
from revmux_vllm.engine.worker import RevMuxWorker
from revmux_vllm.families import FAMILIES, FLOAT16, Family
from revmux_vllm.planning.planner import Counts
from revmux_vllm.rungs import Ends


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_version() -> None:
    assert vllm.__version__.startswith(plugin.SUPPORTED_VLLM)


def test_overridden_signatures() -> None:
    assert parameters(Scheduler.schedule) == ["self", "throttle_prefills"]
    assert parameters(WorkerBase.execute_model) == ["self", "scheduler_output"]
    assert parameters(AttentionMetadataBuilder.build) == [
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ]
    assert parameters(Scheduler.add_request) == ["self", "request"]
    assert parameters(Scheduler.update_from_output) == [
        "self",
        "scheduler_output",
        "model_runner_output",
    ]
    assert parameters(RevMuxWorker.__base__.compile_or_warm_up_model) == ["self"]
    assert parameters(Scheduler.make_stats) == [
        "self",
        "spec_decoding_stats",
        "kv_connector_stats",
        "cudagraph_stats",
        "perf_stats",
        "ec_connector_stats",
    ]


def test_our_scheduler_output_adds_three_fields() -> None:
    theirs = {field.name for field in dataclasses.fields(SchedulerOutput)}
    ours = {field.name for field in dataclasses.fields(RevMuxSchedulerOutput)}
    assert ours - theirs == {"mux_plan", "began_s", "has_chunks", "pairs"}


def test_every_per_sequence_field_of_the_metadata_is_known() -> None:
    """A new field here may need rewriting in ``composite_metadata``."""
    assert {field.name for field in dataclasses.fields(CommonAttentionMetadata)} == {
        # rewritten
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "positions",
        "is_prefilling",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
        # the same for composites, or of features that are refused or off
        "causal",
        "logits_indices_padded",
        "num_logits_indices",
        "max_logits_per_req",
        "encoder_seq_lens",
        "encoder_seq_lens_cpu",
        "dcp_local_seq_lens",
        "dcp_local_seq_lens_cpu_upper_bound",
        "req_idx",
        "mm_req_doc_ranges",
        "rswa_prefix_lens",
        "replayssm_decode_base_cpu",
    }


def test_statistics_still_offer_no_place_of_our_own() -> None:
    """Expires: once ``SchedulerStats`` has a free field, engine/metrics.py should use that."""
    names = {field.name for field in dataclasses.fields(SchedulerStats)}
    assert "waiting_lora_adapters" in names
    assert not {"extra", "plugin_stats", "custom_stats", "additional_stats"} & names
    stats = SchedulerStats()
    counts: Counts = Counter({("requests", "mux:4"): 8, ("composite_slots", ""): 3})
    put_counts(stats, counts)
    assert take_counts(stats) == counts


def test_registering_twice_is_harmless() -> None:
    from vllm.engine import arg_utils

    plugin.register()
    patched = arg_utils.get_model_path
    plugin.register()
    assert arg_utils.get_model_path is patched


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_row_of_the_families_holds_for_vllm(family: Family) -> None:
    from vllm.config import model as vllm_model_config
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.interfaces_base import (
        get_attn_type,
        get_default_seq_pooling_type,
    )

    plugin.register()
    assert FAMILIES[family.model_type] is family
    assert family.architecture in ModelRegistry.get_supported_archs()
    assert MODELS_CONFIG_MAP[family.architecture] is RevMuxModelConfig
    engine_model = resolve_name(family.engine_model)
    assert engine_model.__name__ == family.architecture
    assert issubclass(engine_model, RevMuxForSequenceClassification)
    assert not inspect.isabstract(engine_model)
    assert get_default_seq_pooling_type(engine_model) == (
        "CLS" if family.ends.pools_first else "LAST"
    )
    # vLLM cuts long prompts of a decoder into chunks; what sees all its tokens must run whole.
    assert get_attn_type(engine_model) == ("decoder" if family.has_kv_cache else "encoder_only")
    refused = vllm_model_config._FLOAT16_NOT_SUPPORTED_MODELS.get(family.model_type)
    assert FLOAT16 not in family.refuses or refused == family.refuses[FLOAT16]
    backbone = family.load_backbone_class()
    assert issubclass(backbone, Backbone)
    assert not inspect.isabstract(backbone)


def test_every_architecture_is_of_one_family() -> None:
    assert len({family.architecture for family in FAMILIES.values()}) == len(FAMILIES)


def test_a_failing_registration_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("upstream has changed")

    monkeypatch.setattr("revmux_vllm.engine.bundled_names.resolve_bundled_names", broken)
    plugin.register()


def test_the_backend_is_the_platforms_own_with_another_builder() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    backend = composite_attention_backend(CPUAttentionBackend, 3, Ends(), False)
    assert backend is composite_attention_backend(CPUAttentionBackend, 3, Ends(), False)
    # vLLM builds metadata once for all layers whose backends have one name.
    behind = composite_attention_backend(CPUAttentionBackend, 5, Ends(), False)
    assert backend.full_cls_name() != behind.full_cls_name()
    assert issubclass(backend, CPUAttentionBackend)
    assert issubclass(backend.get_builder_cls(), CPUAttentionBackend.get_builder_cls())
