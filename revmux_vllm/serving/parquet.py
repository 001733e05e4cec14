"""Rows of Parquet files in, the same rows with their answers out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from revmux_vllm.errors import UserError
from revmux_vllm.problems import Problem

BATCH_ROWS = 16_384


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop`` of one file."""

    path: str
    start: int
    stop: int


def answer_columns(prefix: str) -> list[str]:
    """Names of the columns that are added: label, its probability, probabilities of all labels."""
    return [f"{prefix}{name}" for name in ("label", "probability", "probs")]


def find_files(source: Path) -> list[Path]:
    """The Parquet files that ``source`` is or holds, in order of name.

    Raises:
        UserError: if there are none.
    """
    if not source.exists():
        cure = "INPUT is a Parquet file, or a folder"
        raise UserError(f"{source}", "no such file or folder", cure=cure)
    files = [source]
    if source.is_dir():
        files = sorted(p for p in source.glob("*.parquet") if not p.name.startswith(("_", ".")))
    if not files:
        raise UserError(f"{source}", "no *.parquet file lies directly in this folder")
    return files


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """The file, with its schema and its number of rows read.

    Raises:
        UserError: if it is no Parquet file, or a damaged one.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the operating system's, not pyarrow's
        raise UserError(
            f"{path}",
            f"not a Parquet file ({str(error).strip()})",
            cure="for CSV, `pyarrow.csv.read_csv` and `pyarrow.parquet.write_table` make one",
        ) from error


def check_schema(schema: pa.Schema, text_column: str, answer_columns: list[str]) -> None:
    """Raise UserError unless there are texts, and room for the answers."""
    cure = f"`text_column` names one of: {', '.join(schema.names)}"
    if text_column not in schema.names:
        raise UserError(f"no column {text_column!r}", cure=cure)
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(kind) for check in is_text):
        raise UserError(f"column {text_column!r} holds {kind}, not texts", cure=cure)
    if taken := [name for name in answer_columns if name in schema.names]:
        raise UserError(
            "the input has columns named as the answers are",
            ", ".join(taken),
            # The inner backticks name the option, and go when it is spelled.
            cure="with ``prefix` answer_` the answers are named answer_label and so on",
        )


def count_rows(files: Sequence[Path], text_column: str, answer_columns: list[str]) -> list[int]:
    """Rows of each file, once all of them can be read together.

    Raises:
        UserError: naming the file that cannot, and the cure.
    """
    counts: list[int] = []
    first: pa.Schema | None = None
    for path in files:
        with open_parquet(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        if first is None:
            check_schema(schema, text_column, answer_columns)
            first = schema
        if not schema.equals(first):
            raise UserError(
                f"{path}",
                f"its columns ({', '.join(schema.names)}) or their types are not those of "
                f"{files[0]} ({', '.join(first.names)})",
                cure="classify them into folders of their own",
            )
        counts.append(rows)
    return counts


def read_rows(one: Slice) -> pa.Table:
    """Only the row groups that hold them, and no more than a batch of rows too many in memory."""
    with open_parquet(one.path) as file:
        groups, starts, end = [], [], 0
        for group in range(file.metadata.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            if start < one.stop and end > one.start:
                groups.append(group)
                starts.append(start)
        batches, at = [], starts[0]
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups):
            low, high = max(one.start - at, 0), min(one.stop - at, len(batch))
            if low < high:
                batches.append(batch.slice(low, high - low))
            at += len(batch)
            if at >= one.stop:
                break
        return pa.Table.from_batches(batches, file.schema_arrow)


def texts_of(column: pa.ChunkedArray) -> list[str | None]:
    """None where there is nothing to classify; bytes that are no UTF-8 become question marks."""
    texts: list[str | None] = []
    for value in column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
        text = None if value is None else value.decode("utf-8", "replace")
        texts.append(text if text and not text.isspace() else None)
    return texts


def with_answers(
    table: pa.Table,
    probs: Sequence[Sequence[float] | None],
    labels: dict[int, str],
    names: list[str],
    problem: Problem = Problem.ONE_CLASS,
) -> pa.Table:
    """The table with three more columns; rows whose ``probs`` are None have null in all of them.

    Of several labels at once ``label`` has those that are likelier than not, with commas between
    them, as `revmux train` reads them. A single output, a cross-encoder's, says yes or no. Values
    have no label and no probability; they are in the last column.
    """

    def named(row: Sequence[float]) -> str:
        if problem is Problem.VALUES:
            return ""
        if problem is Problem.LABELS:
            return ",".join(labels[i] for i, p in enumerate(row) if p > 0.5)
        if len(row) == 1:
            return "yes" if row[0] > 0.5 else "no"
        return labels[max(range(len(row)), key=row.__getitem__)]

    def sure(row: Sequence[float]) -> float | None:
        if problem is Problem.VALUES:
            return None
        return max(row) if len(row) > 1 else max(row[0], 1 - row[0])

    label = [None if p is None else named(p) for p in probs]
    probability = [None if p is None else sure(p) for p in probs]
    columns = (
        pa.array(label, pa.string()),
        pa.array(probability, pa.float32()),
        pa.array(probs, pa.list_(pa.float32())),
    )
    for name, column in zip(names, columns, strict=True):
        table = table.append_column(name, column)
    return table


def write_whole(table: pa.Table, path: Path) -> None:
    """Beside its place, then renamed; of two that write it at once each writes its own."""
    unfinished = path.with_name(f".{path.stem}.{uuid4().hex}.tmp")
    try:
        with unfinished.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())  # or a machine's crash could leave a name without its rows
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
