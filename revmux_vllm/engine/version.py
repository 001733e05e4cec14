"""The vLLM that RevMUX is made for, and what is said where another one serves a RevMUX model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED_VLLM = "0.32"


def warn_of_other_version(vllm_config: "VllmConfig") -> None:
    """Warn once, naming both versions, where vLLM is not ``SUPPORTED_VLLM``.

    For the config hook, which runs only where a RevMUX model is served, and there in every process
    that makes a ``VllmConfig``: with several API servers in each of them, and before that in their
    parent (rank -1), which alone warns. An engine process gets its own pickled, marked as seen by
    the hook.
    """
    from vllm.logger import init_logger
    from vllm.version import __version__

    parallel = vllm_config.parallel_config
    has_parent = parallel._api_process_count > 1 and parallel._api_process_rank >= 0
    if has_parent or f"{__version__}.".startswith(f"{SUPPORTED_VLLM}."):
        return
    init_logger("vllm.revmux").warning_once(
        "RevMUX: this is vLLM %s, and revmux-vllm is made for %s; whether answers are right with "
        "another version is unknown. Install vllm==%s.*, or a revmux-vllm that names your version "
        "in its table of versions",
        __version__,
        SUPPORTED_VLLM,
        SUPPORTED_VLLM,
    )
