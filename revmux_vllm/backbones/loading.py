"""Read a frozen classifier, check that it is one that can be cut, and cut it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from revmux_vllm.backbones.base import Backbone, LabelWords
from revmux_vllm.errors import UserError
from revmux_vllm.families import LABEL_WORDS, OWN_HEAD, family_of

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers calls them."""
_NOT_COMPUTED = ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping")
"""Keys of decoders' configs that the engine has nothing for."""
_ANOTHER = "train another backbone"
_NOT_APART = (
    "one answer is read of a whole text, and tokens of a composite, or merged ones, cannot be told "
    "apart again"
)
_OTHER_TASKS = {
    "TokenClassification": (
        f"it answers for every token; {_NOT_APART}",
        "plain vLLM serves that of a BERT, RoBERTa or ModernBERT (/pooling), transformers any",
    ),
    "QuestionAnswering": (
        f"it points at tokens; {_NOT_APART}",
        "transformers serves it; whether a text answers a question is a classifier of pairs",
    ),
    "MultipleChoice": (
        "it compares the scores of several texts",
        "fine-tune a classifier of one label in its place: /rerank compares texts by its score",
    ),
}
"""Ends of architectures whose answer is not that of one text, to the reason and the cure."""


def attention_windows(config: Any) -> list[int | None]:
    """How many rows a row of each layer attends to, itself among them; None: all before it.

    Read as transformers reads it, which passes over keys that are not of the family.
    """
    has = type(config)
    window = config.sliding_window if hasattr(has, "sliding_window") else None
    kinds = config.layer_types if hasattr(has, "layer_types") else None
    return [
        window if kind == SLIDING else None
        for kind in kinds or [SLIDING] * config.num_hidden_layers
    ]


def check_family(config: Any, label_words: Sequence[str] | None = None) -> None:
    """Raise UserError unless a transformers ``config`` is of a family that can be cut.

    Args:
        config: of the backbone.
        label_words: one word per class, for a language model that answers with words.
    """
    refuses = family_of(config.model_type).refuses
    for name in config.architectures or ():
        if task := _OTHER_TASKS.get(name.rpartition("For")[2]):
            raise UserError(f"{name} in config.json", task[0], cure=task[1])
    if label_words and LABEL_WORDS in refuses:
        raise UserError("`label_words`", refuses[LABEL_WORDS])
    if not label_words and OWN_HEAD in refuses:
        raise UserError(refuses[OWN_HEAD])
    if given := [key for key in _NOT_COMPUTED if getattr(config, key, None)]:
        raise UserError(f"{given[0]} in config.json is not supported", cure=_ANOTHER)
    kinds = set(getattr(config, "layer_types", None) or ())
    possible = {FULL, SLIDING} if hasattr(type(config), "layer_types") else {FULL}
    if kinds - possible:
        raise UserError(
            "layer_types in config.json",
            f"no {', '.join(sorted(kinds - possible))} in a {config.model_type} is supported",
            cure=_ANOTHER,
        )


def most_positions(config: Any) -> int | None:
    """Tokens that a backbone has positions for; None where they are relative."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and family_of(config.model_type).positions_behind_padding:
        positions -= config.pad_token_id + 1
    return positions


def label_tokens(tokenizer: Any, label_words: Sequence[str]) -> list[int]:
    """The token of each label word.

    Raises:
        UserError: naming a word that is not one token, with its tokens.
    """
    ids = []
    for word in label_words:
        tokens = tokenizer.encode(word, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(
                "`label_words`",
                f"{word!r} is {len(tokens)} tokens, {tokenizer.convert_ids_to_tokens(tokens)}",
                cure="choose a word that is one token (many tokenizers want the space before it, "
                "as in ' positive')",
            )
        if tokens[0] == tokenizer.unk_token_id:
            problem = f"the tokenizer does not know {word!r}"
            raise UserError("`label_words`", problem, cure="choose a word that it has")
        ids.append(tokens[0])
    if len(set(ids)) != len(ids):
        raise UserError("`label_words`", f"{list(label_words)} are not different tokens")
    return ids


def output_scale(config: Any) -> float:
    """What a model multiplies its last state by before the LM head (T5 with tied embeddings)."""
    return config.hidden_size**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0


def model_class(config: Any, label_words: Sequence[str] | None) -> Any:
    """The auto class of transformers that reads a backbone of a supported family."""
    import transformers

    if not label_words:
        return transformers.AutoModelForSequenceClassification
    return getattr(transformers, family_of(config.model_type).word_model)


def load_backbone(
    folder: str | Path,
    prefill_layers: int,
    label_words: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Load a classifier and cut it.

    Args:
        folder: of the classifier, or a hub id.
        prefill_layers: layers (l) of the lower part.
        label_words: one word per class; the model is then a language model (causal or T5) and its
            LM head scores the words.
        dtype: what its layers compute in.

    Raises:
        UserError: for a family that is not supported, weights that are missing, or a word that is
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
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        problem = f"the weights cannot be read: {str(error).splitlines()[0]}"
        raise UserError(str(folder), problem, cure="is the folder complete?") from error
    if missing := sorted(loaded["missing_keys"]):
        cure = "fine-tune it first"
        if label_words:
            cure = "`label_words` needs a language model; for a classifier with a head leave it out"
        elif LABEL_WORDS not in family_of(config.model_type).refuses:
            cure += ", or give `label_words` for a language model"
        problem = f"not a trained {type(model).__name__}: no weights for {', '.join(missing[:3])}"
        raise UserError(str(folder), problem, cure=cure)
    words = LabelWords(model.lm_head.weight, tokens, output_scale(config)) if tokens else None
    cut: type[Backbone] = family_of(config.model_type).load_backbone_class()
    return cut(model, prefill_layers, words)
