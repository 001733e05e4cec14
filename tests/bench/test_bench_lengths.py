"""Texts of the lengths that a benchmark asks for."""

import statistics
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from word_tokenizers import pair_tokenizer, word_tokenizer

from revmux_vllm.bench import lengths
from revmux_vllm.bench.lengths import Lengths, choose_texts, make_prompts, make_texts
from revmux_vllm.bundled import resolve
from revmux_vllm.errors import UserError
from revmux_vllm.terminal import as_flag


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 300])
def test_fixed_lengths_are_hit_exactly(tokens: int) -> None:
    bundled = AutoTokenizer.from_pretrained(resolve("revmux-llama"))
    for tokenizer in (word_tokenizer(), bundled):
        special = len(tokenizer("")["input_ids"])
        mix = Lengths("fixed", tokens + special)
        texts = make_texts(tokenizer, mix, 512, 0)
        assert {len(tokenizer(text)["input_ids"]) for text in texts} == {tokens + special}
        assert len(set(texts)) > min(100, 10 * tokens)


def test_lognormal_lengths_have_the_median_and_the_bounds() -> None:
    tokenizer = pair_tokenizer()
    texts = make_texts(tokenizer, Lengths("lognormal"), 128, 0)
    counts = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert 30 <= statistics.median(counts) <= 36
    assert min(counts) >= 3
    assert max(counts) == 128
    assert statistics.quantiles(counts, n=100)[83] == pytest.approx(33 * 2.7183**0.8, rel=0.15)
    assert texts == make_texts(tokenizer, Lengths("lognormal"), 128, 0)
    assert texts != make_texts(tokenizer, Lengths("lognormal"), 128, 1)


@pytest.mark.parametrize("tokens", [2, 513])
def test_a_fixed_length_that_cannot_be_is_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"fixed:{tokens}: expected 3 to 512 tokens"):
        make_texts(pair_tokenizer(), Lengths("fixed", tokens), 512, 0)


def test_a_tokenizer_without_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_: "##ing")
    with pytest.raises(UserError, match="no word that is one token; use lengths texts") as found:
        make_texts(tokenizer, Lengths("fixed", 8), 512, 0)
    shown = found.value.words(as_flag, typed=True)
    assert "no word that is one token; use --lengths texts with --texts FILE" in shown


def test_texts_come_from_the_file_the_examples_or_the_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts"
    file.write_text("w1 w2\n\nw3\n")
    texts = Lengths("texts")
    assert choose_texts(texts, file) == (texts, file)
    assert choose_texts(texts, None)[1] == lengths.SENTENCES
    assert choose_texts(Lengths("lognormal"), None) == (Lengths("lognormal"), None)
    prompts = make_prompts(word_tokenizer(), texts, 1, 0, file, 3)
    assert [len(ids) for ids in prompts] == [1, 1, 1]
    assert prompts[0] == prompts[2] != prompts[1]
    monkeypatch.setattr(lengths, "SENTENCES", tmp_path / "nowhere")
    assert choose_texts(texts, None) == (Lengths("lognormal"), None)
