"""Labelled text from a TSV file. Every error names the file, the row and the cure."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm.training.losses import UNLABELLED


@dataclass(frozen=True)
class LabelledText:
    """Rows of a file.

    Attributes:
        texts: one string a row, or a pair.
        labels: class indices.
    """

    texts: list[str] | list[tuple[str, str]]
    labels: list[int]


def read_tsv(path: str | Path, num_labels: int) -> LabelledText:
    """Read ``label<TAB>text`` or ``label<TAB>text_a<TAB>text_b`` with one header line, no quoting.

    Args:
        path: UTF-8 file.
        num_labels: classes of the backbone; labels are 0 .. num_labels - 1.

    Raises:
        ValueError: naming file and row.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from error
    header = lines[0].split("\t") if lines else []
    if header not in (["label", "text"], ["label", "text_a", "text_b"]):
        raise ValueError(
            f"{path}: row 1: expected the columns label and text, or label, text_a and text_b, "
            f"separated by tabs; found {header}"
        )
    texts: list[Any] = []
    labels: list[int] = []
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(
                f"{path}: row {number}: expected {len(header)} fields, found {len(fields)}"
            )
        label, *text = fields
        if not label.isdecimal() or int(label) >= num_labels:
            raise ValueError(
                f"{path}: row {number}: label {label!r}: expected an integer from 0 to "
                f"{num_labels - 1}, as the backbone has {num_labels} classes"
            )
        if not all(part.strip() for part in text):
            raise ValueError(f"{path}: row {number}: empty text; drop the row")
        labels.append(int(label))
        texts.append(tuple(text) if len(text) > 1 else text[0])
    if len(set(labels)) < 2:
        raise ValueError(f"{path}: expected at least two classes, found labels {set(labels)}")
    return LabelledText(texts, labels)


def with_spliced_copies(data: LabelledText, copies: float, seed: int) -> LabelledText:
    """``data`` and, behind it, unlabelled texts made of it, ``copies`` for every row.

    The head of one row is joined to the tail of another and a tenth of the words is dropped. A
    backbone knows its training rows by heart; on these it is as unsure as on new text, and that is
    what adapters have to learn to reproduce. Of a pair the second text is spliced.
    """
    rng = random.Random(seed)
    texts: list[Any] = list(data.texts)
    for i in range(int(copies * len(data.texts))):
        row, other = data.texts[i % len(data.texts)], rng.choice(data.texts)
        if isinstance(row, tuple):
            texts.append((row[0], _splice(row[1], other[1], rng)))
        else:
            texts.append(_splice(row, str(other), rng))
    return LabelledText(texts, data.labels + [UNLABELLED] * (len(texts) - len(data.labels)))


def _splice(text: str, other: str, rng: random.Random) -> str:
    head, tail = text.split(), other.split()
    words = head[: rng.randint(0, len(head))] + tail[rng.randint(0, len(tail)) :]
    return " ".join(word for word in words if rng.random() >= 0.1) or text
