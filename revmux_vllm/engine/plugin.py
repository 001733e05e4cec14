"""Entry point ``vllm.general_plugins``: what vLLM learns about RevMUX when it starts.

vLLM calls ``register`` in every process, also when another model is served, and an exception in it
would stop them all: so it imports nothing heavy, and leaves all checks to ``RevMuxModelConfig``,
which vLLM calls only for our architectures.
"""

SUPPORTED_VLLM = "0.32"
FAMILIES = {
    "decoder": ("Llama", "Mistral", "Qwen2", "Qwen3"),
    "encoder": ("Bert", "Roberta"),
    "t5": ("T5",),
}
MODELS = {
    name: f"revmux_vllm.engine.models.{module}:{name}"
    for module, families in FAMILIES.items()
    for name in (f"RevMux{family}ForSequenceClassification" for family in families)
}
WITHOUT_KV_CACHE = tuple(name for name, path in MODELS.items() if ".decoder:" not in path)
ONE_PROCESS = tuple(name for name, path in MODELS.items() if ".t5:" in path)
POOL_FIRST_TOKEN = tuple(name for name, path in MODELS.items() if ".encoder:" in path)


def register() -> None:
    """Register the bundled names, the architectures and their config hook. Idempotent."""
    from vllm.logger import init_logger

    try:
        from vllm.config import model as vllm_model_config
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from revmux_vllm.engine.bundled_names import resolve_bundled_names
        from revmux_vllm.engine.model_config import RevMuxModelConfig

        for architecture, path in MODELS.items():
            ModelRegistry.register_model(architecture, path)
            MODELS_CONFIG_MAP[architecture] = RevMuxModelConfig
        resolve_bundled_names()
        # Its feed-forward layers overflow, and float16 is what vLLM takes for a float32 classifier.
        vllm_model_config._FLOAT16_NOT_SUPPORTED_MODELS["t5"] = (
            "T5 overflows in float16; --dtype bfloat16 or float32 is the cure"
        )
    except Exception:
        init_logger("vllm.revmux").exception(
            "revmux-vllm could not register itself and is inactive; other models are not "
            "affected. It is made for vLLM %s.",
            SUPPORTED_VLLM,
        )
