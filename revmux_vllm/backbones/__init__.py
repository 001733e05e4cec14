"""How a frozen transformers classifier is cut in two: for training and as the reference answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from revmux_vllm.backbones.base import Backbone, LabelWords
from revmux_vllm.backbones.decoder import DecoderBackbone
from revmux_vllm.backbones.encoder import EncoderBackbone
from revmux_vllm.backbones.t5 import T5Backbone

FAMILIES: dict[str, type[Backbone]] = {
    "bert": EncoderBackbone,
    "roberta": EncoderBackbone,
    "llama": DecoderBackbone,
    "mistral": DecoderBackbone,
    "qwen2": DecoderBackbone,
    "qwen3": DecoderBackbone,
    "t5": T5Backbone,
}

__all__ = [
    "FAMILIES",
    "Backbone",
    "check_family",
    "label_tokens",
    "load_backbone",
    "model_class",
    "most_positions",
]


def check_family(config: Any, label_words: Sequence[str] | None = None) -> None:
    """Raise ValueError unless a transformers ``config`` is of a family that can be cut.

    Args:
        config: of the backbone.
        label_words: one word per class, for a language model that answers with words.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; supported are "
            + ", ".join(FAMILIES)
        )
    if family is EncoderBackbone and label_words:
        raise ValueError(
            f"--label-words: a {config.model_type} classifier has a head of its own; leave it out"
        )
    if family is T5Backbone and not label_words:
        raise ValueError(
            "a T5 backbone answers with words: give --label-words, one word per class. "
            "T5ForSequenceClassification is not supported: it reads the whole text a second time "
            "in its decoder, which a composite cannot"
        )


def most_positions(config: Any) -> int | None:
    """Tokens that a backbone has positions for; None where they are relative."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type == "roberta":
        positions -= config.pad_token_id + 1  # it counts them from behind its padding token
    return positions


def label_tokens(tokenizer: Any, label_words: Sequence[str]) -> list[int]:
    """The token of each label word.

    Raises:
        ValueError: naming a word that is not one token, with its tokens.
    """
    ids = []
    for word in label_words:
        tokens = tokenizer.encode(word, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(
                f"--label-words: {word!r} is {len(tokens)} tokens, "
                f"{tokenizer.convert_ids_to_tokens(tokens)}; choose a word that is one token "
                "(many tokenizers want the space before it, as in ' positive')"
            )
        if tokens[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"--label-words: the tokenizer does not know {word!r}; choose a word that it has"
            )
        ids.append(tokens[0])
    if len(set(ids)) != len(ids):
        raise ValueError(f"--label-words: {list(label_words)} are not different tokens")
    return ids


def output_scale(config: Any) -> float:
    """What a model multiplies its last state by before the LM head (T5 with tied embeddings)."""
    return config.hidden_size**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0


def model_class(config: Any, label_words: Sequence[str] | None) -> Any:
    """The auto class of transformers that reads a backbone of a supported family."""
    import transformers

    if not label_words:
        return transformers.AutoModelForSequenceClassification
    if FAMILIES[config.model_type] is T5Backbone:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def load_backbone(
    folder: str | Path, prefill_layers: int, label_words: Sequence[str] | None = None
) -> Backbone:
    """Load a classifier in float32 and cut it.

    Args:
        folder: of the classifier, or a hub id.
        prefill_layers: layers (l) of the lower part.
        label_words: one word per class; the model is then a language model (causal or T5) and its
            LM head scores the words.

    Raises:
        ValueError: for a family that is not supported, weights that are missing, or a word that is
            not one token.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    check_family(config, label_words)
    tokens: list[int] = []
    if label_words:
        tokens = label_tokens(AutoTokenizer.from_pretrained(folder), label_words)
    if quantization := getattr(config, "quantization_config", None):
        # Else transformers keeps int8 weights until the whole model runs, which it never does here.
        quantization["run_compressed"] = False
    try:
        model, loaded = model_class(config, label_words).from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: the weights cannot be read: {str(error).splitlines()[0]}; is the folder "
            "complete?"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        cure = (
            "--label-words needs a language model; for a classifier with a head leave it out"
            if label_words
            else "fine-tune it first, or give --label-words for a language model"
        )
        raise ValueError(
            f"{folder}: not a trained {type(model).__name__}: no weights for "
            f"{', '.join(missing[:3])}; {cure}"
        )
    words = LabelWords(model.lm_head.weight, tokens, output_scale(config)) if tokens else None
    return FAMILIES[config.model_type](model, prefill_layers, words)
