"""Models of the Hugging Face hub as folders: from the cache where they are, else downloaded."""

import re
from pathlib import Path
from typing import Any

from revmux_vllm.errors import UserError

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
OTHER_WEIGHTS = ("pytorch_model*.bin",)
NOT_READ = ("checkpoint-*", "consolidated*", "onnx/*", "openvino/*", "original/*")


def is_id(name: str) -> bool:
    """Whether ``name`` may be a model of the hub: `USER/NAME`, and no folder."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists()


def snapshot(name: str, revision: str | None = None) -> Path:
    """The folder of a model, with its config, tokenizer and weights.

    Args:
        name: `USER/NAME`.
        revision: commit, tag or branch; None is the newest.

    Raises:
        UserError: where it can be had from neither the cache nor the hub.
    """
    from huggingface_hub import snapshot_download

    at = f" at {revision}" if revision else ""
    try:
        wanted: Any = {"revision": revision, "ignore_patterns": list(NOT_READ)}
        folder = Path(snapshot_download(name, allow_patterns=list(FILES), **wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=list(OTHER_WEIGHTS), **wanted)
    except Exception as error:  # the hub has many: offline, no such name, no right to read it, ...
        cause = (str(error).strip() or repr(error)).splitlines()[0]
        cure = "is the name right, and the hub to be reached (HF_ENDPOINT, HF_HUB_OFFLINE)?"
        raise UserError(f"{name}{at}", f"cannot be had from the hub: {cause}", cure=cure) from error
    return folder


def config_of(name: str, revision: str | None = None) -> Path | None:
    """The ``config.json`` of a model; None where there is none to be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception:  # whoever wants the model itself will say why
        return None
