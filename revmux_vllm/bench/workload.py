"""The model that is measured, and the texts that it is loaded with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm import bundled, checkpoint
from revmux_vllm.backbones.loading import most_positions
from revmux_vllm.bench.lengths import Lengths, choose_texts, make_prompts, make_texts
from revmux_vllm.bench.settings import OfflineSettings, OnlineSettings, option_of_vllm
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError
from revmux_vllm.families import family_of
from revmux_vllm.planning.options import read_options
from revmux_vllm.rungs import Rung


@dataclass(frozen=True)
class Model:
    """A checkpoint.

    Attributes:
        name: as the user gave it.
        folder: where it is.
        config: its ``revmux`` object.
        num_layers: layers L of the backbone.
        in_use: rungs that a server uses unless told otherwise.
        plain_architecture: vLLM's own class for the backbone; None where vLLM alone cannot serve
            it: it answers with label words, or vLLM has no class for its family.
    """

    name: str
    folder: Path
    config: RevMuxConfig
    num_layers: int
    in_use: tuple[Rung, ...]
    plain_architecture: str | None


@dataclass(frozen=True)
class Workload:
    """A model, and texts of some lengths."""

    model: Model
    lengths: Lengths
    texts: list[str]


def read_model(name: str, load_format: str | None = None) -> Model:
    """Read a checkpoint; its weights are checked unless they are drawn at random (``dummy``).

    Raises:
        UserError: if it is none.
    """
    folder = bundled.resolve(name)
    measured = None
    if load_format != "dummy":
        checkpoint.validate(folder)
        measured = checkpoint.read_measured(folder)
    config, values = checkpoint.read_config(folder)
    layers = checkpoint.backbone_shape(values)[1]
    plain = None if config.label_words else family_of(values["model_type"]).plain_architecture
    in_use = read_options({}, config, measured).rungs
    return Model(name, folder, config, layers, in_use, plain)


def prepare(settings: OnlineSettings) -> Workload:
    """Read the checkpoint and make the texts of ``revmux bench online``.

    Raises:
        UserError: for a model that cannot be measured, options that its scheduler does not know,
            or texts that cannot be made.
    """
    model = read_model(settings.model, settings.load_format)
    if model.plain_architecture is None:
        why = (
            "it answers with label words" if model.config.label_words else "vLLM has no such class"
        )
        raise UserError(
            model.name,
            f"{why}; vLLM alone cannot serve that backbone, so there is nothing to compare with",
            cure="`revmux bench offline` compares with the backbone alone",
        )
    read_options(settings.additional_config, model.config)
    lengths, texts = choose_texts(settings.lengths, settings.texts)
    tokenizer = read_tokenizer(model.folder)
    most = most_tokens(model.folder, tokenizer, settings.server_args) - settings.shared_prefix
    made = make_texts(tokenizer, lengths, most, settings.seed, texts)
    if settings.shared_prefix:
        (prefix, *_) = make_texts(tokenizer, _prefix(settings, most), most, settings.seed)
        made = [f"{prefix} {text}" for text in made]
    return Workload(model, lengths, made)


def _prefix(settings: OfflineSettings | OnlineSettings, most: int) -> Lengths:
    """Raises UserError where the model takes no text behind it."""
    if most < 1:
        problem = f"the model takes {most + settings.shared_prefix} tokens, with the text"
        raise UserError("`shared_prefix`", problem, found=settings.shared_prefix)
    return Lengths("fixed", settings.shared_prefix)


def prepare_prompts(settings: OfflineSettings, model: Model) -> tuple[Lengths, list[list[int]]]:
    """Token ids of one round of ``revmux bench offline``, and what was chosen as their lengths.

    Raises:
        UserError: for texts that cannot be made.
    """
    lengths, texts = choose_texts(settings.lengths, settings.texts)
    tokenizer = read_tokenizer(model.folder)
    most = most_tokens(model.folder, tokenizer) - settings.shared_prefix
    seed, prefix = settings.seed, []
    if settings.shared_prefix:
        fixed = _prefix(settings, most)
        (prefix,) = make_prompts(tokenizer, fixed, settings.shared_prefix, seed, None, 1)
    own = make_prompts(tokenizer, lengths, most, seed, texts, settings.requests)
    return lengths, [[*prefix, *prompt] for prompt in own]


def read_tokenizer(folder: Path) -> Any:
    """Of a checkpoint, as transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def most_tokens(folder: Path, tokenizer: Any, server_args: tuple[str, ...] = ()) -> int:
    """The longest text that the model takes, special tokens counted."""
    from transformers import AutoConfig

    limits = [tokenizer.model_max_length, most_positions(AutoConfig.from_pretrained(folder))]
    if (given := option_of_vllm(server_args, "max-model-len")) is not None:
        if not given.isdecimal():
            raise UserError(f"`server_args` --max-model-len {given}", expected="a number here")
        limits.append(int(given))
    return int(min(limit for limit in limits if limit))
