"""``revmux-llama`` means the bundled folder, from any working directory, online and offline, and
``USER/NAME`` a checkpoint of the hub with its adapters.

vLLM would read a checkpoint of the hub file by file; ours is checked whole before anything starts,
so it is fetched first and served as the folder that it then is.

vLLM has a redirection of names (``VLLM_MODEL_REDIRECT_PATH``), but 0.32 asks the hub for a name
twice before it reads that: in ``EngineArgs.__post_init__`` with ``HF_HUB_OFFLINE=1``, and in
``create_engine_config`` always (engine/arg_utils.py). A name that is no repository fails there, so
both places are wrapped. tests/engine/test_bundled_names.py expires them.
"""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

from revmux_vllm import hub
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
        ours = folder_of(model) or fetched(model, revision)
        return model if ours else look_up(model, revision)

    @functools.wraps(configure)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = self.model
        if folder := folder_of(named) or fetched(named, self.revision):
            self.served_model_name = self.served_model_name or named
            self.model = folder
            if self.dtype == "auto" and folder_of(named):
                self.dtype = native_dtype()
            if self.tokenizer == named:
                self.tokenizer = folder
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


def fetched(name: Any, revision: str | None) -> str | None:
    """The folder of a RevMUX checkpoint of the hub; None for any other name.

    Raises:
        UserError: where it is one, and not all of it can be had.
    """
    if not isinstance(name, str) or not hub.is_id(name):
        return None
    config = hub.config_of(name, revision)
    if config is None or "revmux" not in json.loads(config.read_text(encoding="utf-8")):
        return None
    return str(hub.snapshot(name, revision))
