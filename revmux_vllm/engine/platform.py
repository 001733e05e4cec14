"""What this machine computes with: the contact with ``vllm.platforms``."""


def is_cpu() -> bool:
    """Whether vLLM runs on CPUs here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def native_dtype() -> str:
    """``float32`` on a CPU without bfloat16 instructions, where bfloat16 is several times slower.

    Elsewhere ``auto``, which is the checkpoint's own.
    """
    import torch

    if not is_cpu():
        return "auto"
    return "auto" if torch.cpu._is_avx512_bf16_supported() else "float32"
