"""``revmux-llama`` means the bundled folder, from any working directory.

vLLM's own model redirection (``VLLM_MODEL_REDIRECT_PATH``, read in config/model.py after the served
name is taken) does it. One patch is needed beside it: with ``HF_HUB_OFFLINE=1`` vLLM 0.32 looks
every name up in the hub cache (``EngineArgs.__post_init__``) before it redirects, and fails.
"""

import inspect
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

from revmux_vllm.bundled import bundled_checkpoints


def redirect_bundled_names() -> None:
    """Point vLLM's redirection at the bundled folders, unless the user redirects himself.

    A folder of that name in the working directory wins, so it is left out.
    """
    if os.environ.get("VLLM_MODEL_REDIRECT_PATH"):
        return
    names = {name: str(path) for name, path in bundled_checkpoints().items()}
    text = json.dumps({name: path for name, path in names.items() if not Path(name).is_dir()})
    folder = Path(tempfile.gettempdir()) / f"revmux-vllm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    target = folder / f"models-{zlib.crc32(text.encode()):08x}.json"
    partial = folder / f"{target.name}.{os.getpid()}"
    partial.write_text(text)
    partial.replace(target)
    os.environ["VLLM_MODEL_REDIRECT_PATH"] = str(target)


def keep_bundled_names_offline() -> None:
    """Let vLLM's offline look-up pass bundled names on to the redirection. Idempotent.

    Raises:
        RuntimeError: if vLLM's function is not the one this was written for.
    """
    from vllm.engine import arg_utils

    original = arg_utils.get_model_path
    if getattr(original, "_revmux", False):
        return
    if list(inspect.signature(original).parameters) != ["model", "revision"]:
        raise RuntimeError("vllm.engine.arg_utils.get_model_path has changed")

    def get_model_path(model: Any, revision: str | None = None) -> Any:
        return model if str(model) in bundled_checkpoints() else original(model, revision)

    get_model_path._revmux = True  # type: ignore[attr-defined]
    arg_utils.get_model_path = get_model_path
