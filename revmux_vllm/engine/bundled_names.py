"""``revmux-llama`` means the bundled folder, from any working directory, online and offline.

vLLM has a redirection of names (``VLLM_MODEL_REDIRECT_PATH``), but 0.32 asks the hub for a name
twice before it reads that: in ``EngineArgs.__post_init__`` with ``HF_HUB_OFFLINE=1``, and in
``create_engine_config`` always (engine/arg_utils.py). A name that is no repository fails there, so
both places are wrapped. tests/engine/test_bundled_names.py expires them.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

from revmux_vllm.assembly import assembled
from revmux_vllm.bundled import bundled_checkpoints
from revmux_vllm.engine.platform import native_dtype


def resolve_bundled_names() -> None:
    """Let ``EngineArgs`` replace a bundled name by its folder. Idempotent.

    The name stays the served one. A folder of that name in the working directory wins.

    Raises:
        RuntimeError: if vLLM's functions are not those that this was written for.
    """
    from vllm.engine import arg_utils

    look_up, configure = arg_utils.get_model_path, arg_utils.EngineArgs.create_engine_config
    if hasattr(look_up, "__wrapped__"):
        return
    if list(inspect.signature(look_up).parameters) != ["model", "revision"]:
        raise RuntimeError("vllm.engine.arg_utils.get_model_path has changed")
    if next(iter(inspect.signature(configure).parameters)) != "self":
        raise RuntimeError("vllm.engine.arg_utils.EngineArgs.create_engine_config has changed")

    @functools.wraps(look_up)
    def get_model_path(model: Any, revision: str | None = None) -> Any:
        return model if folder_of(model) else look_up(model, revision)

    @functools.wraps(configure)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if folder := folder_of(self.model):
            self.served_model_name = self.served_model_name or self.model
            self.model = folder
            if self.dtype == "auto":
                self.dtype = native_dtype()
        self.tokenizer = folder_of(self.tokenizer) or self.tokenizer
        return configure(self, *args, **kwargs)

    arg_utils.get_model_path = get_model_path
    arg_utils.EngineArgs.create_engine_config = create_engine_config


def folder_of(name: Any) -> str | None:
    """The bundled folder that ``name`` means; None for any other name, path or None."""
    if not isinstance(name, str | Path) or Path(name).is_dir():
        return None
    folder = bundled_checkpoints().get(str(name))
    return None if folder is None else str(assembled(folder))
