"""Token ids as a server makes them, and what is said where it would not."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from word_tokenizers import words_of

from revmux_vllm.training.data import LabelledText
from revmux_vllm.training.features import tokenize


def test_a_first_token_that_comes_twice_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """As in a text that a chat template made."""
    words = words_of("<s>")
    words.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="[UNK]")
    plain = LabelledText(["w5 w6", "w7"], [0, 1])
    assert tokenize(tokenizer, plain, 8)["input_ids"] == [[1, 5, 6], [1, 7]]
    assert not caplog.text
    rows = LabelledText(["w5 w6", "<s> w7", "<s> w8"], [0, 1, 0])
    assert tokenize(tokenizer, rows, 8)["input_ids"][1] == [1, 1, 7]
    assert "2 rows begin with <s> twice, the first of them row 2" in caplog.text
    assert "`messages`" in caplog.text
