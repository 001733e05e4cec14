"""vLLM's config hook for our architectures: choose scheduler and worker, refuse what cannot work.

vLLM calls it once per process with the whole ``VllmConfig`` (config/vllm.py,
``try_verify_and_update_config``), before any engine process starts. For vLLM a decoder of ours is a
decoder, so steps are as long as plain vLLM's, by default and by the user's options, and a prompt
longer than a step runs in chunks. Encoders and T5 are ``encoder_only``: their sequences run whole.
"""

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import attention_windows, check_family, most_positions
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.graphs import choose_capture_sizes
from revmux_vllm.engine.guard import warn_of_open_routes
from revmux_vllm.engine.kv_cache import choose_block_size, size_kv_cache
from revmux_vllm.engine.platform import native_dtype
from revmux_vllm.engine.refusals import refuse_impossible_options
from revmux_vllm.engine.stat_logger_entry import offer_stat_logger
from revmux_vllm.families import family_of
from revmux_vllm.planning.options import Options, read_options
from revmux_vllm.prompts import render

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.revmux")
MOST_MERGED = 17
"""Tokens of a row: all but one may lie before the end of a prefix, in its last block of 16."""
_with_template: set[Any] = set()
"""Classes of models that were told in this process how the text of a pair is made."""


class RevMuxModelConfig(VerifyAndUpdateConfig):
    """Hook of every ``RevMux*ForSequenceClassification``."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Set what multiplexing needs.

        Raises:
            UserError: naming each option that cannot work as the user typed it, with the cure, or
                what is wrong with the checkpoint.
        """
        hf_config = vllm_config.model_config.hf_config
        check_family(hf_config, RevMuxConfig.from_dict(hf_config.revmux).label_words)
        refuse_impossible_options(vllm_config)
        warn_of_open_routes(sys.argv[1:])
        if vllm_config.load_config.load_format != "dummy":
            checkpoint.validate(vllm_config.model_config.model)
            checkpoint.backbone_folder(vllm_config.model_config.model)  # of the hub: fetched now
        served_options(vllm_config)
        _offer_score_template(vllm_config)
        vllm_config.scheduler_config.scheduler_cls = "revmux_vllm.engine.scheduler.RevMuxScheduler"
        vllm_config.parallel_config.worker_cls = "revmux_vllm.engine.worker.RevMuxWorker"
        offer_stat_logger()
        choose_capture_sizes(vllm_config)
        _keep_one_table(vllm_config)
        _keep_prefixes(vllm_config)
        _cap_length(vllm_config)
        choose_block_size(vllm_config)
        size_kv_cache(vllm_config)
        if vllm_config.model_config.dtype.itemsize == 2 and native_dtype() == "float32":
            logger.warning(
                "RevMUX: this CPU has no bfloat16 instructions and emulates %s, several times "
                "slower; --dtype float32 is the cure",
                vllm_config.model_config.dtype,
            )


def served_options(vllm_config: "VllmConfig") -> Options:
    """The user's options, over what the checkpoint was measured and calibrated to be.

    Raises:
        UserError: see ``read_options``.
    """
    model = vllm_config.model_config
    measured, contracts = None, []
    if vllm_config.load_config.load_format != "dummy":
        measured = checkpoint.read_measured(model.model)
        contracts = checkpoint.read_contracts(model.model)
    config = RevMuxConfig.from_dict(model.hf_config.revmux)
    return read_options(vllm_config.additional_config, config, measured, contracts)


def _offer_score_template(vllm_config: "VllmConfig") -> None:
    """Let `/score` and `/rerank` make the text of a pair as it was made in training.

    vLLM asks the model's class (entrypoints/pooling/scoring/io_processor.py), and a process serves
    one model. ``--chat-template`` of the user's wins.
    """
    for served_before in _with_template:
        served_before.supports_score_template = False
    config = RevMuxConfig.from_dict(vllm_config.model_config.hf_config.revmux)
    if (template := config.score_template) is None:
        return
    from vllm.model_executor.model_loader import get_model_cls

    model: Any = get_model_cls(vllm_config.model_config)
    _with_template.add(model)
    model.supports_score_template = True
    model.get_score_template = staticmethod(partial(render, template))
    model.post_process_tokens = staticmethod(lambda prompt: None)


def _keep_one_table(vllm_config: "VllmConfig") -> None:
    """All layers keep all blocks of a sequence: where only some have an attention window, vLLM
    would give these a table of blocks of their own."""
    if len(set(attention_windows(vllm_config.model_config.hf_config))) > 1:
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True


def _keep_prefixes(vllm_config: "VllmConfig") -> None:
    """Prefix caching as vLLM has it, but where windows would leave holes in a prefix: where all
    layers have one, vLLM keeps the blocks inside alone."""
    cache, hf_config = vllm_config.cache_config, vllm_config.model_config.hf_config
    if not cache.enable_prefix_caching:
        return
    rungs = RevMuxConfig.from_dict(hf_config.revmux).rungs
    because = None
    if None not in attention_windows(hf_config):
        because = "attention of every layer has a sliding window"
    elif max((rung.shortening for rung in rungs), default=1) > MOST_MERGED:
        because = f"more than {MOST_MERGED} tokens become one row"
    if because is not None:
        cache.enable_prefix_caching = False
        logger.info("RevMUX: prefix caching is off, because %s", because)


def _cap_length(vllm_config: "VllmConfig") -> None:
    """No prompt beyond an encoder's table of positions: it would end the engine.

    vLLM does not know where RoBERTa's ends: it looks for ``position_embedding_type``, which
    transformers 5 no longer has.
    """
    model = vllm_config.model_config
    positions = most_positions(model.hf_config)
    if (
        family_of(model.hf_config.model_type).ends.pools_first
        and positions
        and model.max_model_len > positions
    ):
        model.max_model_len = vllm_config.scheduler_config.max_model_len = positions
