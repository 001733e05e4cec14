"""What this machine computes with: the contact with ``vllm.platforms``."""


def is_cpu() -> bool:
    """Whether vLLM runs on CPUs here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def native_dtype() -> str:
    """``bfloat16`` on a CPU with instructions for it, else ``float32``: there it is much slower.

    Of a checkpoint in float32 ``auto`` would make float16, which a CPU computes slowest. Elsewhere
    ``auto``: the checkpoint's own, or float16.
    """
    import torch

    if not is_cpu():
        return "auto"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
