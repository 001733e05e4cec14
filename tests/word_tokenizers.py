"""Tokenizers of made-up words, for backbones that nobody trained."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320


def words_of(*special: str) -> Tokenizer:
    """A tokenizer of made-up words w1 .. w319, the first of them replaced by special tokens."""
    names = [*special, *(f"w{i}" for i in range(1 + len(special), VOCAB_SIZE))]
    vocab = {"[UNK]": 0} | {name: i for i, name in enumerate(names, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of made-up words w1 .. w319."""
    return PreTrainedTokenizerFast(
        tokenizer_object=words_of(), unk_token="[UNK]", pad_token="[UNK]", model_max_length=512
    )


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The same from w3 on, as BERT has it: [CLS] first, [SEP] behind each text, token types."""
    words = words_of("[CLS]", "[SEP]")
    words.post_processor = TemplateProcessing(
        "[CLS]:0 $A:0 [SEP]:0",
        "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    )


def save_pair_tokenizer(folder: Path) -> None:
    """``pair_tokenizer`` in place of a checkpoint's own."""
    pair_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
