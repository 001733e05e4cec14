"""RevMUX for vLLM: several classification requests share one pass through the upper layers.

Importing this package needs neither torch, vLLM nor Ray: what it exports is loaded when it is asked
for. vLLM imports it in every process, also where another model is served.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revmux_vllm.adapters.coupling import ReversibleCoupling as ReversibleCoupling
    from revmux_vllm.adapters.kinds import AdapterLadder as AdapterLadder
    from revmux_vllm.config import RevMuxConfig as RevMuxConfig
    from revmux_vllm.config import layer_limit as layer_limit
    from revmux_vllm.errors import UserError as UserError
    from revmux_vllm.planning.packing import MuxPlan as MuxPlan
    from revmux_vllm.planning.packing import pack as pack

__version__ = "0.1.0"

_EXPORTS = {
    "AdapterLadder": "revmux_vllm.adapters.kinds",
    "MuxPlan": "revmux_vllm.planning.packing",
    "RevMuxConfig": "revmux_vllm.config",
    "ReversibleCoupling": "revmux_vllm.adapters.coupling",
    "UserError": "revmux_vllm.errors",
    "layer_limit": "revmux_vllm.config",
    "pack": "revmux_vllm.planning.packing",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
