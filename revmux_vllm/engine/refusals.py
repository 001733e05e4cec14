"""What vLLM offers and RevMUX cannot run with: each is refused by name, with the cure.

Every value is read as it stands when the config hook runs, early in ``VllmConfig.__post_init__``
(config/vllm.py, 0.32): ``--kv-offloading-size`` has not become a KV connector yet, and
``--worker-cls`` is ``auto`` unless the user named one.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm import envs

from revmux_vllm.backbones.loading import attention_windows
from revmux_vllm.engine.version import warn_of_other_version
from revmux_vllm.errors import UserError
from revmux_vllm.families import TENSOR_PARALLEL, Family, family_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LEAVE_OUT = "leave the option out"
_VLLMS_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"


def refuse_impossible_options(vllm_config: "VllmConfig") -> None:
    """Refuse what cannot work, after a warning where vLLM is of another version.

    Raises:
        UserError: naming each option as the user typed it, with the cure.
    """
    warn_of_other_version(vllm_config)
    parts = (
        _refused_tasks,
        _refused_scheduling,
        _refused_caching,
        _refused_parallelism,
        _refused_graphs,
    )
    refused = [line for part in parts for line in part(vllm_config)]
    if refused:
        raise UserError("RevMUX cannot run with\n  " + "\n  ".join(refused))


def _refused_tasks(vllm_config: "VllmConfig") -> Iterator[str]:
    """What is asked of the model, and what stands in its config."""
    model = vllm_config.model_config
    if model.runner_type != "pooling":
        yield (
            f"--runner {model.runner_type}: a RevMUX checkpoint classifies; use --runner pooling "
            "or leave the option out"
        )
    if vllm_config.lora_config is not None:
        yield f"--enable-lora: adapters of another kind; {_LEAVE_OUT}"
    if vllm_config.speculative_config is not None:
        yield f"--speculative-config: a classifier decodes nothing; {_LEAVE_OUT}"
    read_at = "CLS" if _family(vllm_config).ends.pools_first else "LAST"
    pooler = model.pooler_config
    if pooler is not None and pooler.seq_pooling_type not in (None, read_at):
        yield (
            f"--pooler-config pooling_type {pooler.seq_pooling_type}: of a composite's member only "
            f"the token that the backbone pools ({read_at}) is known; {_LEAVE_OUT}"
        )


def _refused_scheduling(vllm_config: "VllmConfig") -> Iterator[str]:
    """Who schedules, and what would cut a sequence that must run whole."""
    scheduler = vllm_config.scheduler_config
    family = _family(vllm_config)
    if scheduler.enable_chunked_prefill and (family.ends.pools_first or not family.has_kv_cache):
        yield (
            f"--enable-chunked-prefill: every token of a {family.model_type} sequence sees all "
            f"others, so it must run whole; {_LEAVE_OUT}"
        )
    if scheduler.long_prefill_token_threshold > 0:
        yield (
            f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold}: it cuts "
            f"prompts, and a composite needs its members whole; {_LEAVE_OUT}"
        )
    name = _name(scheduler.scheduler_cls)
    if name not in ("", _VLLMS_SCHEDULER) and not _is_ours(name):
        yield f"--scheduler-cls {name}: RevMUX's own scheduler plans composites; {_LEAVE_OUT}"


def _refused_caching(vllm_config: "VllmConfig") -> Iterator[str]:
    """What would keep a step's keys and values, or take them elsewhere."""
    cache = vllm_config.cache_config
    family = _family(vllm_config)
    if cache.enable_prefix_caching and not family.has_kv_cache:
        yield (
            f"--enable-prefix-caching: {family.model_type} keeps no keys and values of a prompt; "
            f"{_LEAVE_OUT}"
        )
    separate = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is False
    if separate and len(set(attention_windows(vllm_config.model_config.hf_config))) > 1:
        yield (
            "--no-disable-hybrid-kv-cache-manager: composites have one table of blocks for layers "
            f"with and without an attention window; {_LEAVE_OUT}"
        )
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        yield (
            f"--kv-transfer-config {transfer.kv_connector}: the upper layers' pages belong to a "
            f"composite, not to a prompt, so no other engine can use them; {_LEAVE_OUT}"
        )
    if cache.kv_offloading_size is not None:
        yield (
            f"--kv-offloading-size {cache.kv_offloading_size:g}: what the KV cache keeps "
            f"of a prompt depends on its rung; {_LEAVE_OUT}"
        )
    encodings = vllm_config.ec_transfer_config
    if encodings is not None and encodings.ec_connector is not None:
        yield (
            f"--ec-transfer-config {encodings.ec_connector}: texts come without encodings of "
            f"images that could be transferred; {_LEAVE_OUT}"
        )


def _refused_parallelism(vllm_config: "VllmConfig") -> Iterator[str]:
    """How the work is shared among processes, and in which of ours it runs."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: the multiplexer sits "
            "between two layers of one worker; use 1, and --data-parallel-size or replicas to "
            "scale out"
        )
    family = _family(vllm_config)
    if parallel.tensor_parallel_size > 1 and (reason := family.refuses.get(TENSOR_PARALLEL)):
        yield f"--tensor-parallel-size {parallel.tensor_parallel_size}: {reason}"
    for option, size in (
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            yield (
                f"{option} {size}: a composite's rows cannot be shared among ranks; use 1, and "
                "--tensor-parallel-size to use more devices"
            )
    if parallel.use_ubatching:
        option = "--enable-dbo" if parallel.enable_dbo else f"--ubatch-size {parallel.ubatch_size}"
        yield f"{option}: it cuts a step's batch, and composites with it; {_LEAVE_OUT}"
    if parallel.worker_cls != "auto" and not _is_ours(parallel.worker_cls):
        yield (
            f"--worker-cls {parallel.worker_cls}: RevMUX's own worker takes the plan to the "
            f"layers; {_LEAVE_OUT}"
        )


def _refused_graphs(vllm_config: "VllmConfig") -> Iterator[str]:
    """Graphs that would hold more than rows: the slots that keys and values are written to."""
    if vllm_config.compilation_config.use_inductor_graph_partition:
        yield (
            "-cc.use_inductor_graph_partition: its graphs hold the cache's writes, and a "
            f"composite's go elsewhere at every step; {_LEAVE_OUT}"
        )
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        yield (
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1: its graphs hold what lies between the layers, which "
            "is another at every step; unset it"
        )


def _family(vllm_config: "VllmConfig") -> Family:
    return family_of(vllm_config.model_config.hf_config.model_type)


def _name(named: str | type[object] | None) -> str:
    """Of a class that vLLM takes as a path or as itself; empty where the user named none."""
    return f"{named.__module__}.{named.__qualname__}" if isinstance(named, type) else named or ""


def _is_ours(class_path: str) -> bool:
    """Whether the hook itself has set this class, in an earlier run."""
    return class_path.startswith("revmux_vllm.")
