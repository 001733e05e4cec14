"""Rows of a file or a hub data set, whatever its format. Mistakes are named with their row."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revmux_vllm.errors import UserError, require

Row = tuple[int, dict[str, Any]]
"""Where it stands in its file, and its fields."""

_COLON = re.compile(r":(?![^\[]*\])")  # not one inside the brackets of a slice


@dataclass(frozen=True)
class Table:
    """A data set.

    Attributes:
        columns: names.
        rows: that have exactly these columns.
        classes: of columns whose values are indices into names, these names by column.
    """

    columns: list[str]
    rows: Iterator[Row]
    classes: dict[str, list[str]] = field(default_factory=dict)


def open_rows(source: str | Path) -> Table:
    """The rows of a file by its ending, or of a hub data set.

    Raises:
        UserError: now or while rows are taken, naming the file, the row and the cure.
    """
    path = Path(source)
    if not path.is_file():
        if _COLON.search(str(source)) and path.suffix not in READERS:
            return _open_hub(str(source))
        raise UserError(f"{source}", "no such file")
    if path.suffix not in READERS:
        raise UserError(f"{source}", expected=f"a file ending in {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source}: row {row}",
            f"not UTF-8 at byte {error.start}",
            cure="convert the file, for example with iconv",
        ) from error


def _lines(path: Path) -> list[str]:
    """Lines that end in LF or CRLF and in nothing else; Excel's byte order mark is dropped."""
    text = path.read_bytes().decode("utf-8-sig")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _read_tsv(path: Path) -> Table:
    lines = _lines(path)
    return _fields(path, ((i, line.split("\t")) for i, line in enumerate(lines, 1)))


def _read_csv(path: Path) -> Table:
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
            cure = "close the quotes, and double those inside a text"
            raise UserError(f"{path}: row {first}", str(error), cure=cure) from error

    return _fields(path, lines())


def _fields(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Table:
    _, header = next(lines, (1, []))

    def rows() -> Iterator[Row]:
        for number, fields in lines:
            if len(fields) != len(header):
                verb = "quote" if path.suffix == ".csv" else "replace"
                raise UserError(
                    f"{path}: row {number}",
                    expected=f"{len(header)} fields",
                    found=len(fields),
                    cure=f"{verb} separators and line ends that belong to a text",
                )
            yield number, dict(zip(header, fields, strict=True))

    return Table(header, rows())


def _read_jsonl(path: Path) -> Table:
    lines = _lines(path)

    def parse(number: int, line: str) -> Mapping[str, Any]:
        place = f"{path}: row {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(place, f"not JSON: {error}", cure="write one object a line") from error
        if not isinstance(row, dict):
            raise UserError(place, expected="an object with column names", found=line[:40])
        return row

    columns = list(parse(1, lines[0])) if lines else []

    def rows() -> Iterator[Row]:
        for number, line in enumerate(lines, 1):
            row = parse(number, line)
            if missing := [column for column in columns if column not in row]:
                raise UserError(
                    f"{path}: row {number}",
                    f"missing {', '.join(missing)}, which the first row has",
                    cure="add it or drop the row",
                )
            yield number, dict(row)

    return Table(columns, rows())


def _read_parquet(path: Path) -> Table:
    require("pyarrow", extra="train")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}", f"not a Parquet file: {error}") from error
    # What the datasets library notes of the columns when it writes such a file.
    noted = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    inner = {name: f.get("feature", f) for name, f in features.items() if isinstance(f, dict)}
    classes = {
        name: feature["names"]
        for name, feature in inner.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    return Table(table.column_names, iter(enumerate(table.to_pylist(), 1)), classes)


READERS = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _open_hub(source: str) -> Table:
    require("datasets", extra="train")
    from datasets import ClassLabel, load_dataset

    name, *config, split = _COLON.split(source)
    try:
        data = load_dataset(name, *config, split=split)
    except Exception as error:  # the hub has many: offline, no such name, no such split, ...
        problem = f"neither a file nor a hub data set that can be read: {error}"
        raise UserError(source, problem) from error
    inner = {name: getattr(f, "feature", f) for name, f in data.features.items()}  # of a list
    classes = {name: f.names for name, f in inner.items() if isinstance(f, ClassLabel)}
    return Table(data.column_names, iter(enumerate(data, 1)), classes)
