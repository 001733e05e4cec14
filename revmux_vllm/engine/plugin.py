"""Entry point ``vllm.general_plugins``: what vLLM learns about RevMUX when it starts.

vLLM calls ``register`` in every process, also when another model is served, and an exception in it
would stop them all: so it imports nothing heavy, and leaves all checks to ``RevMuxModelConfig``,
which vLLM calls only for our architectures.
"""

from revmux_vllm.engine.version import SUPPORTED_VLLM
from revmux_vllm.families import FAMILIES, FLOAT16


def register() -> None:
    """Register the bundled names, the architectures and their config hook. Idempotent."""
    from vllm.logger import init_logger

    try:
        from vllm.config import model as vllm_model_config
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from revmux_vllm.engine.bundled_names import resolve_bundled_names
        from revmux_vllm.engine.model_config import RevMuxModelConfig

        for family in FAMILIES.values():
            ModelRegistry.register_model(family.architecture, family.engine_model)
            MODELS_CONFIG_MAP[family.architecture] = RevMuxModelConfig
            if FLOAT16 in family.refuses:
                without = vllm_model_config._FLOAT16_NOT_SUPPORTED_MODELS
                without[family.model_type] = family.refuses[FLOAT16]
        resolve_bundled_names()
    except Exception:
        init_logger("vllm.revmux").exception(
            "revmux-vllm could not register itself and is inactive; other models are not "
            "affected. It is made for vLLM %s.",
            SUPPORTED_VLLM,
        )
