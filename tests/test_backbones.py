"""Cut in two and put together, every family gives transformers' own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_backbone
from word_tokenizers import VOCAB_SIZE, word_tokenizer

from revmux_vllm.backbones.base import inside
from revmux_vllm.backbones.loading import label_tokens, load_backbone
from revmux_vllm.families import FAMILIES
from revmux_vllm.reference import rows_at

WORDS = ["w7", "w8", "w9"]
LENGTHS = torch.tensor([9, 1, 5])


def whole_and_cut(family: str, folder: Path, cut: int, words: Any = None) -> tuple[Any, Any]:
    save_backbone(family, folder, words is not None)
    if not words:
        loader: Any = transformers.AutoModelForSequenceClassification
    elif family.startswith("t5"):
        loader = transformers.AutoModelForSeq2SeqLM
    else:
        loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder).eval(), load_backbone(folder, cut, words)


def run(backbone: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    states = backbone.upper(backbone.lower(ids, LENGTHS, **inputs), LENGTHS)
    return backbone.head(rows_at(states, backbone.output_position(LENGTHS)))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5"])
@pytest.mark.parametrize("cut", [1, 3])
@torch.no_grad()
def test_a_classifier_keeps_its_logits(family: str, cut: int, tmp_path: Path) -> None:
    whole, backbone = whole_and_cut(family, tmp_path, cut)
    tokens = inside(LENGTHS, 9)
    ids = torch.randint(2, VOCAB_SIZE, (3, 9)) * tokens + ~tokens * whole.config.pad_token_id
    inputs: dict[str, Any] = {}
    if family == "bert":
        inputs["token_type_ids"] = (torch.arange(9) > 2).long().expand(3, -1)
    expected = whole(input_ids=ids, attention_mask=tokens.long(), **inputs).logits
    torch.testing.assert_close(run(backbone, ids, **inputs), expected, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.num_layers == 4
    assert backbone.train().training is False


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "t5", "t5-v1.1"])
@torch.no_grad()
def test_label_words_are_scored_by_the_lm_head(family: str, tmp_path: Path) -> None:
    whole, backbone = whole_and_cut(family, tmp_path, 2, WORDS)
    tokens = inside(LENGTHS, 9)
    ids = torch.randint(2, VOCAB_SIZE, (3, 9)) * tokens
    if family.startswith("t5"):
        start = torch.full((3, 1), whole.config.decoder_start_token_id)
        out = whole(input_ids=ids, attention_mask=tokens, decoder_input_ids=start)
        logits = out.logits[:, 0]
    else:
        logits = rows_at(whole(input_ids=ids).logits, LENGTHS - 1)
    expected = logits[:, label_tokens(word_tokenizer(), WORDS)]
    torch.testing.assert_close(run(backbone, ids), expected, atol=1e-5, rtol=1e-4)


def test_a_word_of_several_tokens_is_named() -> None:
    with pytest.raises(ValueError, match=r"'w7 w8' is 2 tokens, \['w7', 'w8'\]"):
        label_tokens(word_tokenizer(), ["w7 w8", "w9"])
    with pytest.raises(ValueError, match="not different tokens"):
        label_tokens(word_tokenizer(), ["w7", "w7"])


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("t5", None, "give label_words, one word per class"),
        ("bert", WORDS, "has a head of its own"),
        ("gpt2", None, "'gpt2' is not supported; supported are bert, roberta, llama"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    family: str, words: Any, message: str, tmp_path: Path
) -> None:
    save_backbone(family, tmp_path, words is not None)
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path, 1, words)
