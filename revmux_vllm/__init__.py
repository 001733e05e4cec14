"""RevMUX for vLLM: several classification requests share one pass through the upper layers.

Importing this package needs neither vLLM nor Ray.
"""

from revmux_vllm.adapters import AdapterLadder, RevMuxAdapter
from revmux_vllm.config import RevMuxConfig, layer_limit
from revmux_vllm.coupling import ReversibleCoupling
from revmux_vllm.packing import MuxPlan, pack

__version__ = "0.1.0"

__all__ = [
    "AdapterLadder",
    "MuxPlan",
    "RevMuxAdapter",
    "RevMuxConfig",
    "ReversibleCoupling",
    "layer_limit",
    "pack",
]
