"""What is called in vLLM still takes what we give it, and what would break in silence."""

import dataclasses
import inspect
import pickle
import re
from pkgutil import resolve_name
from types import SimpleNamespace as Request
from typing import Any

import pytest

API = "vllm.entrypoints.launchers"
MODELS, LAYERS = "vllm.model_executor.models", "vllm.model_executor.layers"
DECODER = {"vllm_config": 0, "prefix": ""}
LAYER = {"config": 0, "cache_config": 0, "quant_config": 0, "prefix": ""}
SELF = 0

CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("api_server.py", f"{API}.api_server.entry:build_async_engine_client", ("args",), {}),
    (
        "api_server.py",
        f"{API}.api_server.app_state:init_app_state",
        ("engine", "state", "args", "tasks"),
        {},
    ),
    ("api_server.py", f"{API}.app:build_app", ("args", "tasks", "model_config"), {}),
    (
        "in_process.py",
        "vllm:LLM.classify",
        (SELF, "inputs"),
        {"use_tqdm": 0, "pooling_params": 0, "tokenization_kwargs": 0},
    ),
    ("in_process.py", "vllm:PoolingParams", (), {"use_activation": False}),
    ("scheduler.py", "vllm.v1.core.sched.request_queue:create_request_queue", ("policy",), {}),
    (
        "scheduler.py",
        "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests",
        (SELF, "requests"),
        {},
    ),
    (
        "scheduler.py",
        "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests",
        (SELF, "requests"),
        {},
    ),
    ("worker.py", "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run", (SELF, 16), {}),
    (
        "attention.py",
        "vllm.v1.attention.backend:subclass_attention_backend",
        ("Name", "base", "builder"),
        {},
    ),
    (
        "attention.py",
        "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support",
        ("config", "spec"),
        {},
    ),
    (
        "model_config.py",
        f"{MODELS}.config:VerifyAndUpdateConfig.verify_and_update_config",
        ("config",),
        {},
    ),
    (
        "metrics.py",
        "vllm.v1.metrics.loggers:StatLoggerBase.record",
        (SELF, "stats", "iteration"),
        {},
    ),
    (
        "models/base.py",
        f"{LAYERS}.pooler.seqwise:pooler_for_classify",
        ("config",),
        {"pooling": 0, "classifier": 0},
    ),
    (
        "models/base.py",
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.Source",
        ("model",),
        {"revision": 0, "allow_patterns_overrides": 0},
    ),
    (
        "models/base.py",
        f"{MODELS}.utils:AutoWeightsLoader.load_weights",
        (SELF, "weights"),
        {"mapper": 0},
    ),
    ("models/decoder.py", f"{MODELS}.llama:LlamaDecoderLayer", (), DECODER),
    ("models/decoder.py", f"{MODELS}.mistral:MistralDecoderLayer", (), DECODER),
    ("models/decoder.py", f"{MODELS}.qwen2:Qwen2DecoderLayer", (), LAYER),
    ("models/decoder.py", f"{MODELS}.qwen3:Qwen3DecoderLayer", (), LAYER),
    ("models/decoder.py", f"{MODELS}.gemma:GemmaDecoderLayer", (), LAYER),
    ("models/decoder.py", f"{MODELS}.gemma3:Gemma3DecoderLayer", (), LAYER),
    ("models/encoder.py", f"{MODELS}.bert:BertLayer", (), LAYER),
    ("models/electra.py", f"{MODELS}.bert:BertEmbedding", ("config",), {}),
    ("models/electra.py", f"{MODELS}.bert:BertEmbedding.forward", (SELF, "ids", "positions"), {}),
    ("models/encoder.py", f"{MODELS}.bert:BertPooler", ("model_config",), {}),
    ("models/encoder.py", f"{MODELS}.roberta:RobertaClassificationHead", ("model_config",), {}),
    (
        "models/modernbert.py",
        f"{MODELS}.modernbert:ModernBertLayer",
        (),
        {"config": 0, "layer_id": 0, "dtype": 0, "quant_config": 0, "prefix": ""},
    ),
    ("models/modernbert.py", f"{MODELS}.modernbert:ModernBertEmbeddings", ("config",), {}),
    ("models/modernbert.py", f"{MODELS}.modernbert:ModernBertPredictionHead", ("config",), {}),
    (
        "models/padded.py",
        f"{LAYERS}.attention:EncoderOnlyAttention",
        (1, 64, 1.0),
        {"prefix": ""},
    ),
    ("models/pairs.py", f"{MODELS}.bert:_encode_token_type_ids", ("ids", "types"), {}),
    ("models/deberta.py", f"{MODELS}.bert:_decode_token_type_ids", ("ids",), {}),
]


@pytest.mark.parametrize(
    ("file", "name", "args", "kwargs"),
    CALLS,
    ids=[f"{c[0]}:{c[1].rpartition(':')[2]}" for c in CALLS],
)
def test_it_takes_what_we_give(file: str, name: str, args: Any, kwargs: Any) -> None:
    try:
        inspect.signature(resolve_name(name)).bind(*args, **kwargs)
    except (TypeError, ImportError, AttributeError) as error:
        pytest.fail(f"look at revmux_vllm/engine/{file}: {name}: {error}")


def test_requests_wait_in_no_queue_that_we_do_not_know() -> None:
    """engine/scheduler.py exchanges ``waiting`` for a step; another queue would bypass the plan."""
    from vllm.v1.core.sched.scheduler import Scheduler

    made = re.findall(r"self\.(\w+) = create_request_queue", inspect.getsource(Scheduler.__init__))
    assert sorted(made) == ["kv_holding_waiting", "waiting"]


def test_prepending_to_a_queue_turns_the_order_round() -> None:
    """engine/scheduler.py, ``_only`` hands them over reversed because of it."""
    from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

    queue = create_request_queue(SchedulingPolicy.FCFS)
    a, b, c = (Request(i=i) for i in range(3))
    queue.add_request(c)
    queue.prepend_requests(reversed([a, b]))
    assert [request.i for request in queue] == [0, 1, 2]


def test_the_engine_process_has_the_name_that_orphans_looks_for() -> None:
    from vllm.v1.engine.utils import CoreEngineProcManager

    from revmux_vllm.engine.orphans import ENGINE_PROCESS

    assert f'"{ENGINE_PROCESS}' in inspect.getsource(CoreEngineProcManager.__init__)


def test_slots_are_still_where_the_upper_layers_replace_them() -> None:
    """engine/attention.py, ``enter_upper_layers``: without it answers are garbage."""
    from vllm.forward_context import ForwardContext

    assert {"attn_metadata", "slot_mapping"} <= {f.name for f in dataclasses.fields(ForwardContext)}


def test_a_steps_times_ride_on_its_output() -> None:
    """engine/worker.py sets an attribute, which must survive the way to the scheduler."""
    from vllm.v1.outputs import ModelRunnerOutput

    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    output.revmux_times = [1]  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(output)).revmux_times == [1]


def test_the_group_of_plugins_has_its_name() -> None:
    from importlib.metadata import distribution

    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    groups = {entry.group for entry in distribution("revmux-vllm").entry_points}
    assert DEFAULT_PLUGINS_GROUP in groups


def test_a_stat_logger_still_switches_statistics_on_for_every_model() -> None:
    """Expires: else declare it in pyproject.toml, and delete engine/stat_logger_entry.py."""
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(AsyncLLM.__init__)
    assert "load_stat_logger_plugin_factories()" in source
    assert "self.log_stats = log_stats or has_custom_loggers" in source
