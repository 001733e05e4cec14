"""Text to train and measure on. Every mistake is named with file, row and cure, before any work."""

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm.training.losses import UNLABELLED

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

Row = tuple[int, dict[str, Any]]  # where it stands in its file, and its fields


@dataclass(frozen=True)
class LabelledText:
    """Rows of a data set.

    Attributes:
        texts: one string a row, or a pair.
        labels: class indices; ``UNLABELLED`` where the data has no labels.
    """

    texts: list[str] | list[tuple[str, str]]
    labels: list[int]

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
) -> LabelledText:
    """Read a file or a hub data set.

    Args:
        source: ``.tsv`` (no quoting), ``.csv``, ``.jsonl`` or ``.parquet``, UTF-8, with column
            names; or a hub data set as ``NAME:SPLIT`` or ``NAME:CONFIG:SPLIT``.
        label_names: the backbone's classes in order. A label is an index or one of these names.
        text_columns: one column, or two for pairs. Default: the first of ``TEXT_COLUMNS`` there is.
        label_column: default: the first of ``LABEL_COLUMNS`` there is; without one the rows are
            unlabelled.
        need_labels: refuse unlabelled rows.

    Raises:
        ValueError: naming the file, the row and the cure.
    """
    if text_columns and len(text_columns) > 2:
        raise ValueError(f"--text-columns {','.join(text_columns)}: expected one, or two for pairs")
    columns, rows = _open(source)
    texts_at = _choose(source, columns, text_columns, TEXT_COLUMNS, "--text-columns")
    label_at = None
    if label_column or need_labels or set(LABEL_COLUMNS) & set(columns):
        named = (label_column,) if label_column else None
        labels_at = [(name,) for name in LABEL_COLUMNS]
        (label_at,) = _choose(source, columns, named, labels_at, "--label-column")
    texts: list[Any] = []
    labels: list[int] = []
    kind: type | None = None
    for number, row in rows:
        text = tuple(row[column] for column in texts_at)
        if not all(isinstance(part, str) for part in text):
            raise ValueError(
                f"{source}: row {number}: expected text, found {text}; write it as a string, or "
                "name the columns of the text with --text-columns"
            )
        if not all(part.strip() for part in text):
            raise ValueError(f"{source}: row {number}: empty text; drop the row")
        texts.append(text if len(text) > 1 else text[0])
        if label_at is None:
            labels.append(UNLABELLED)
            continue
        try:
            label, own_kind = _label(row[label_at], label_names)
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from None
        if kind not in (None, own_kind):
            raise ValueError(
                f"{source}: row {number}: label {row[label_at]!r}: mixed label types; write all of "
                "them as indices or all as names"
            )
        kind = own_kind
        labels.append(label)
    if not texts:
        raise ValueError(f"{source}: no rows below the header")
    if label_at is not None and len(set(labels)) < 2:
        raise ValueError(
            f"{source}: all {len(labels)} rows have the label {label_names[labels[0]]!r}; expected "
            "at least two classes"
            + ("" if need_labels else "; to learn from the backbone alone drop the label column")
        )
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
    raise ValueError(
        f"{source}: row 1: expected the columns {wanted}; found {', '.join(columns) or 'nothing'}. "
        f"Name yours with {option}"
    )


def _label(value: Any, names: Sequence[str]) -> tuple[int, type]:
    if isinstance(value, str) and value in names:
        return names.index(value), str
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(names):
        return number, int
    raise ValueError(
        f"label {value!r}: expected an integer from 0 to {len(names) - 1} or one of the "
        f"backbone's classes, {', '.join(names)}"
    )


def _open(source: str | Path) -> tuple[list[str], Iterator[Row]]:
    """Column names and rows; the rows have exactly these columns."""
    path = Path(source)
    if not path.is_file():
        if ":" in str(source) and path.suffix not in READERS:
            return _open_hub(str(source))
        raise ValueError(f"{source}: no such file")
    if path.suffix not in READERS:
        raise ValueError(f"{source}: expected a file ending in {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{source}: row {row}: not UTF-8 at byte {error.start}; convert the file, for example "
            "with iconv"
        ) from error


def _lines(path: Path) -> list[str]:
    """Lines that end in LF or CRLF and in nothing else; Excel's byte order mark is dropped."""
    text = path.read_bytes().decode("utf-8-sig")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _read_tsv(path: Path) -> tuple[list[str], Iterator[Row]]:
    lines = _lines(path)
    return _fields(path, ((i, line.split("\t")) for i, line in enumerate(lines, 1)))


def _read_csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    csv.field_size_limit(2**31 - 1)
    text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    reader = csv.reader(text, strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        first = 1
        try:
            for fields in reader:
                yield reader.line_num, fields
                first = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path}: row {first}: {error}; close the quotes, and double those inside a text"
            ) from error

    return _fields(path, lines())


def _fields(path: Path, lines: Iterator[tuple[int, list[str]]]) -> tuple[list[str], Iterator[Row]]:
    _, header = next(lines, (1, []))

    def rows() -> Iterator[Row]:
        for number, fields in lines:
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}: row {number}: expected {len(header)} fields, found {len(fields)}; "
                    + ("quote" if path.suffix == ".csv" else "replace")
                    + " separators and line ends that belong to a text"
                )
            yield number, dict(zip(header, fields, strict=True))

    return header, rows()


def _read_jsonl(path: Path) -> tuple[list[str], Iterator[Row]]:
    lines = _lines(path)

    def parse(number: int, line: str) -> Mapping[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}: row {number}: not JSON: {error}; write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: row {number}: expected an object with column names, found {line[:40]!r}"
            )
        return row

    columns = list(parse(1, lines[0])) if lines else []

    def rows() -> Iterator[Row]:
        for number, line in enumerate(lines, 1):
            row = parse(number, line)
            if missing := [column for column in columns if column not in row]:
                raise ValueError(
                    f"{path}: row {number}: missing {', '.join(missing)}, which the first row has; "
                    "add it or drop the row"
                )
            yield number, dict(row)

    return columns, rows()


def _read_parquet(path: Path) -> tuple[list[str], Iterator[Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    return table.column_names, iter(enumerate(table.to_pylist(), 1))


READERS = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _open_hub(source: str) -> tuple[list[str], Iterator[Row]]:
    from datasets import load_dataset

    name, *config, split = source.split(":")
    try:
        data = load_dataset(name, *config, split=split)
    except Exception as error:  # the hub has many: offline, no such name, no such split, ...
        raise ValueError(
            f"{source}: neither a file nor a hub data set that can be read: {error}"
        ) from error
    return data.column_names, iter(enumerate(data, 1))


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
    what adapters have to learn to reproduce. Of a pair the second text is spliced.
    """
    rng = random.Random(seed)
    texts: list[Any] = []
    for i in range(round(copies * len(data))):
        row, other = data.texts[i % len(data)], rng.choice(data.texts)
        if isinstance(row, tuple):
            texts.append((row[0], _splice(row[1], other[1], rng)))
        else:
            texts.append(_splice(row, str(other), rng))
    return LabelledText(texts, [UNLABELLED] * len(texts))


def _splice(text: str, other: str, rng: random.Random) -> str:
    head, tail = text.split(), other.split()
    words = head[: rng.randint(0, len(head))] + tail[rng.randint(0, len(tail)) :]
    return " ".join(word for word in words if rng.random() >= 0.1) or text
