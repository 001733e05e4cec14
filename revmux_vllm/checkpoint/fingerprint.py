"""Which backbone it is that adapters were trained on, told without reading all of its weights."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from revmux_vllm.checkpoint.files import read_json

BACKBONE_FILES = ("model*.safetensors", "model.safetensors.index.json")
OTHER_FILES = ("pytorch_model*.bin",)
SAMPLE = 1024
"""Values of every tensor that are looked at: a training changes all of them."""


def fingerprint(folder: str | Path) -> dict[str, Any]:
    """Of a backbone's folder.

    Returns:
        ``weights``: a hash of every tensor's name, shape and first values (of files that are no
        safetensors, of all their bytes). ``labels``: the names of the classes, in order.
        ``tokenizer``: a hash of its vocabulary. None stands for what the folder does not have.
    """
    folder = Path(folder)
    labels = read_json(folder / "config.json").get("id2label")
    in_order = labels and [labels[key] for key in sorted(labels, key=int)]
    return {
        "weights": _hash(_weights(folder)),
        "labels": in_order or None,
        "tokenizer": _hash(_vocabulary(folder)),
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; what one of them does not have does not."""
    words = []
    for key in ("weights", "labels", "tokenizer"):
        here, there = found.get(key), expected.get(key)
        if here is not None and there is not None and here != there:
            was = ", ".join(there) if isinstance(there, list) else there[:12]
            now = ", ".join(here) if isinstance(here, list) else here[:12]
            words.append(f"{key} were {was}, are {now}")
    return words


def _hash(parts: Iterator[bytes]) -> str | None:
    digest, empty = hashlib.sha256(), True
    for part in parts:
        digest.update(part)
        empty = False
    return None if empty else digest.hexdigest()


def _weights(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob(BACKBONE_FILES[0])):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_slice(name)
                shape = tensor.get_shape()
                yield f"{name} {shape} {tensor.get_dtype()}".encode()
                # A few rows of the first dimension are as many values as are looked at.
                width = max(1, math.prod(shape[1:]))
                first = tensor[: max(1, SAMPLE // width)] if shape else file.get_tensor(name)
                yield first.flatten()[:SAMPLE].float().numpy().tobytes()
    if not any(folder.glob(BACKBONE_FILES[0])):
        for pattern in OTHER_FILES:
            for path in sorted(folder.glob(pattern)):
                with path.open("rb") as file:
                    yield hashlib.file_digest(file, "sha256").digest()


def _vocabulary(folder: Path) -> Iterator[bytes]:
    path = folder / "tokenizer.json"
    if path.is_file():
        model = read_json(path).get("model", {})
        yield json.dumps(model.get("vocab"), sort_keys=True).encode()
