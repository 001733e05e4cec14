"""Text to train and measure on. Every mistake is named with file, row and cure, before any work."""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm.errors import UserError
from revmux_vllm.problems import Problem
from revmux_vllm.training.files import open_rows
from revmux_vllm.training.labels import blank_like, is_blank, reader

TEXT_COLUMNS = (  # pairs first: QNLI has a question beside its sentence
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text",),
    ("sentence",),
)
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class LabelledText:
    """Rows of a data set.

    Attributes:
        texts: one string a row, or a pair.
        labels: class indices; of several labels a list of zeros and ones each; or lists of values.
            Where the data has none they are blank (``labels.is_blank``).
    """

    texts: list[str] | list[tuple[str, str]]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pairs(self) -> bool:
        """Whether the texts are pairs."""
        return isinstance(self.texts[0], tuple)

    def __add__(self, other: "LabelledText") -> "LabelledText":
        texts: Any = [*self.texts, *other.texts]
        return LabelledText(texts, self.labels + other.labels)

    def select(self, rows: Sequence[int]) -> "LabelledText":
        """Some of the rows, in the order given."""
        texts: Any = [self.texts[row] for row in rows]
        return LabelledText(texts, [self.labels[row] for row in rows])


def read_rows(
    source: str | Path,
    label_names: Sequence[str],
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    need_labels: bool = False,
    words: bool = False,
    problem: Problem = Problem.ONE_CLASS,
    read_labels: bool = True,
) -> LabelledText:
    """Read a file or a hub data set.

    Args:
        source: ``.tsv`` (no quoting), ``.csv``, ``.jsonl`` or ``.parquet``, UTF-8, with column
            names; or a hub data set as ``NAME:SPLIT`` or ``NAME:CONFIG:SPLIT``, where a split may
            be a slice as the datasets library has it, ``train[:1000]``.
        label_names: the backbone's classes in order. A label is an index or one of these names; an
            index is one of the data set's own classes where it has names for them.
        text_columns: one column, or two for pairs. Default: the first of ``TEXT_COLUMNS`` there is.
        label_column: default: the first of ``LABEL_COLUMNS`` there is; without one the rows are
            unlabelled.
        need_labels: refuse unlabelled rows.
        words: ``label_names`` are label words or ours, not what the data set must call its classes.
        problem: what labels are. Several labels may stand in columns of their names.
        read_labels: False passes over labels, whatever they are.

    Raises:
        UserError: naming the file, the row and the cure.
    """
    if text_columns and len(text_columns) > 2:
        raise UserError("`text_columns`", expected="one, or two for pairs", found=text_columns)
    table = open_rows(source)
    columns = table.columns
    texts_at = _choose(source, columns, text_columns, TEXT_COLUMNS, "text_columns")
    labels_at = _labels_at(source, columns, label_names, label_column, need_labels, problem)
    if not read_labels:
        labels_at = ()
    texts: list[Any] = []
    labels: list[Any] = []
    classes = table.classes.get(labels_at[0]) if len(labels_at) == 1 else None
    labelled = reader(problem, label_names, classes, words, f"{source}")
    for number, row in table.rows:
        place = f"{source}: row {number}"
        texts.append(_text(row, texts_at, place))
        found = tuple(row[column] for column in labels_at)
        value = found if len(found) > 1 else found[0] if found else None
        labels.append(labelled.read(value, place))
        if need_labels and is_blank(labels[-1]):
            none = f"label {value!r}, which is none"
            raise UserError(place, none, cure="drop the row, or give labels to all")
    if not texts:
        raise UserError(f"{source}", "no rows below the header")
    is_one = problem is Problem.ONE_CLASS
    if is_one and len(set(labels)) < 2 and not is_blank(labels[0]):
        alike = f"all {len(labels)} rows have the label {label_names[labels[0]]!r}"
        cure = "" if need_labels else "to learn from the backbone alone drop the label column"
        raise UserError(f"{source}", f"{alike}; expected at least two classes", cure=cure)
    return LabelledText(texts, labels)


def _choose(
    source: str | Path,
    columns: Sequence[str],
    given: Sequence[str] | None,
    usual: Sequence[tuple[str, ...]],
    option: str,
) -> tuple[str, ...]:
    for names in [tuple(given)] if given else usual:
        if set(names) <= set(columns):
            return names
    wanted = " and ".join(given) if given else " or ".join(" and ".join(n) for n in usual)
    found = ", ".join(columns) or "nothing"
    problem = f"expected the columns {wanted}; found {found}. Name yours with `{option}`"
    raise UserError(f"{source}: row 1", problem)


def _labels_at(
    source: str | Path,
    columns: Sequence[str],
    names: Sequence[str],
    given: str | None,
    needed: bool,
    problem: Problem,
) -> tuple[str, ...]:
    """Columns of the labels: one, or one for each of several labels; none where there is none."""
    if problem is Problem.LABELS and not given and (own := _columns_of(names, columns)):
        return tuple(own)
    if not (given or needed or set(LABEL_COLUMNS) & set(columns)):
        return ()
    usual = [(name,) for name in LABEL_COLUMNS]
    return _choose(source, columns, (given,) if given else None, usual, "label_column")


def _columns_of(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """A column for every one of ``names``, whatever its case; empty unless all are there."""
    there = {column.casefold(): column for column in columns}
    found = [there[name.casefold()] for name in names if name.casefold() in there]
    return found if len(found) == len(names) else []


def _text(row: dict[str, Any], columns: Sequence[str], place: str) -> str | tuple[str, ...]:
    text = tuple(row[column] for column in columns)
    if not all(isinstance(part, str) for part in text):
        cure = "write it as a string, or name the columns of the text with `text_columns`"
        raise UserError(place, expected="text", found=text, cure=cure)
    if not all(part.strip() for part in text):
        raise UserError(place, "empty text", cure="drop the row")
    return text if len(text) > 1 else text[0]


def split_rows(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on, and some held out, at random from ``seed``.

    A ``share`` of them is held out: at least 64 or a tenth, whichever is fewer, unless it is 0.
    """
    order = random.Random(seed).sample(range(count), count)
    held_out = max(round(count * share), min(64, count // 10)) if share else 0
    return order[held_out:], order[:held_out]


def spliced_copies(data: LabelledText, copies: float, seed: int) -> LabelledText:
    """Unlabelled texts made of ``data``'s, ``copies`` for every row.

    The head of one row is joined to the tail of another and a tenth of the words is dropped. A
    backbone knows its training rows by heart; on these it is as unsure as on new text, and that is
    what adapters have to learn to reproduce. Of a pair the second text is spliced. What all rows
    begin and end with, as an instruction, stays.
    """
    rng = random.Random(seed)
    spliced = [row[1] if isinstance(row, tuple) else row for row in data.texts]
    head, tail = frame(spliced)
    inner = [text[len(head) : len(text) - len(tail)] for text in spliced]
    texts: list[Any] = []
    for i in range(round(copies * len(data))):
        row = data.texts[i % len(data)]
        text = head + _splice(inner[i % len(data)], rng.choice(inner), rng) + tail
        texts.append((row[0], text) if isinstance(row, tuple) else text)
    return LabelledText(texts, [blank_like(data.labels[0])] * len(texts))


def frame(texts: Sequence[str]) -> tuple[str, str]:
    """What all of several texts begin and end with, in whole words."""
    if len(texts) < 2:
        return "", ""
    head = texts[0][: common_start(texts)]
    head = head[: max(map(head.rfind, string.whitespace)) + 1]
    behind = [text[len(head) :][::-1] for text in texts]
    tail = behind[0][: common_start(behind)][::-1]
    start = min((i for i in map(tail.find, string.whitespace) if i >= 0), default=len(tail))
    return head, tail[start:]


def common_start(rows: Sequence[Any]) -> int:
    """How many characters or tokens all of several texts, or lists of tokens, begin with."""
    first, last = min(rows), max(rows)  # all others lie between them
    places = range(min(len(first), len(last)))
    return next((i for i in places if first[i] != last[i]), len(places))


def _splice(text: str, other: str, rng: random.Random) -> str:
    head, tail = text.split(), other.split()
    words = head[: rng.randint(0, len(head))] + tail[rng.randint(0, len(tail)) :]
    return " ".join(word for word in words if rng.random() >= 0.1) or text
