"""Texts of the lengths that a benchmark asks for.

Words are drawn from the tokenizer's own vocabulary and the text is counted by the tokenizer, so
``fixed:64`` is 64 tokens with the special ones. What the words say does not matter to the speed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm.errors import UserError

MEDIAN_TOKENS, SIGMA = 33, 0.8
DISTINCT = 1000
"""Different texts of a mix; longer loads repeat them."""
NUM_WORDS = 256
SENTENCES = Path(__file__).resolve().parents[2] / "examples" / "sentences.txt"


@dataclass(frozen=True)
class Lengths:
    """``texts``, ``fixed`` or ``lognormal``; ``tokens`` belongs to ``fixed``."""

    kind: str
    tokens: int = 0

    def __str__(self) -> str:
        return f"fixed:{self.tokens}" if self.kind == "fixed" else self.kind

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Raises UserError naming what was expected."""
        kind, _, number = text.partition(":")
        if kind in ("texts", "lognormal") and text == kind:
            return cls(kind)
        if kind == "fixed" and number.isdecimal() and int(number) > 0:
            return cls(kind, int(number))
        raise UserError("`lengths`", expected="texts, fixed:N (N tokens) or lognormal", found=text)


def choose_texts(lengths: Lengths, texts: Path | None) -> tuple[Lengths, Path | None]:
    """The mix and its file: without one ``texts`` are the examples' sentences, or ``lognormal``.

    Raises:
        UserError: if ``texts`` is given and would not be read, or holds nothing.
    """
    if texts is None:
        if lengths.kind == "texts" and not SENTENCES.is_file():
            return Lengths("lognormal"), None
        return lengths, SENTENCES if lengths.kind == "texts" else None
    what = f"`texts` {texts}"
    if lengths.kind != "texts":
        raise UserError(what, f"`lengths` {lengths} makes its own", cure="give one of them")
    if not texts.is_file():
        raise UserError(what, "no such file", cure="expected one with a text on every line")
    if not _lines(texts):
        raise UserError(what, "empty", cure="expected a text on every line")
    return lengths, texts


def make_texts(
    tokenizer: Any, lengths: Lengths, most: int, seed: int, texts: Path | None = None
) -> list[str]:
    """Distinct texts of a mix, in the order in which they are sent.

    Args:
        tokenizer: counts tokens, special ones among them.
        lengths: ``lognormal`` has a median of 33 tokens and a sigma of 0.8.
        most: tokens that the model takes; ``lognormal`` is cut there.
        seed: of words and lengths.
        texts: file of ``texts``, one a line.

    Raises:
        UserError: for ``fixed`` beyond ``most`` or below the special tokens, and for a tokenizer
            without words.
    """
    if lengths.kind == "texts":
        if texts is None:
            raise UserError("`lengths` texts", expected="`texts` FILE, one text a line")
        return _lines(texts)
    least = _count(tokenizer, "") + 1
    if lengths.kind == "fixed" and not least <= lengths.tokens <= most:
        takes = f"{least} to {most} tokens, which is what the model takes with its special tokens"
        raise UserError(f"`lengths` {lengths}", expected=takes)
    rng = random.Random(seed)
    words = known_words(tokenizer, rng)
    made = []
    for _ in range(DISTINCT):
        wanted = lengths.tokens or round(MEDIAN_TOKENS * rng.lognormvariate(0, SIGMA))
        made.append(_text_of(tokenizer, words, min(max(wanted, least), most), rng))
    return made


def make_prompts(
    tokenizer: Any, lengths: Lengths, most: int, seed: int, texts: Path | None, count: int
) -> list[list[int]]:
    """Token ids of ``count`` texts of ``make_texts``, which are repeated as needed."""
    made = make_texts(tokenizer, lengths, most, seed, texts)[:count]
    ids: list[list[int]] = tokenizer(made, truncation=True, max_length=most)["input_ids"]
    return [ids[i % len(ids)] for i in range(count)]


def known_words(tokenizer: Any, rng: random.Random) -> list[str]:
    """Up to ``NUM_WORDS`` words that are one token wherever they stand.

    Raises:
        UserError: if there are none.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    rng.shuffle(ids)
    special = _count(tokenizer, "")
    words: list[str] = []
    for token in ids:
        word = tokenizer.decode([token]).strip()
        # Thrice: at the start of a text many tokenizers have another token for a word.
        if word.isalnum() and _count(tokenizer, f"{word} {word} {word}") == special + 3:
            words.append(word)
            if len(words) == NUM_WORDS:
                break
    if not words:
        problem = "this tokenizer has no word that is one token"
        raise UserError("`lengths`", problem, cure="use `lengths` texts with `texts` FILE")
    return words


def _text_of(tokenizer: Any, words: Sequence[str], tokens: int, rng: random.Random) -> str:
    """Words that are ``tokens`` tokens together, or as near as they come."""
    chosen = rng.choices(words, k=max(1, tokens - _count(tokenizer, "")))
    while (found := _count(tokenizer, " ".join(chosen))) > tokens and len(chosen) > 1:
        chosen.pop()
    while found < tokens:
        longer = [*chosen, rng.choice(words)]
        found = _count(tokenizer, " ".join(longer))
        if found <= tokens:
            chosen = longer
    return " ".join(chosen)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
