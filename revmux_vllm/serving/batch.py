"""One run of ``revmux batch``: its partitions, its parts, and how it is resumed.

* **A partition is a range of rows** of the input in file order, files in order of name, and one
  file of the output: ``part-00000.parquet`` has the rows of the first one in their order, with all
  columns of the input and ``label``, ``probability`` (of that label) and ``probs`` (of all labels).
* **A part is there whole or not at all**: it is written beside its place and renamed. So a run that
  was interrupted in any way is resumed by the same command, which skips the parts that are there.
  ``run.json`` keeps what parts depend on, and a command that differs in it is refused. Options of
  the engines (``llm_args``) are not kept: they may be what has to change before a run can go on.
* **Texts** that are null, empty or blank get null for an answer, since the model has nothing to say
  about them. Texts longer than the model takes are cut at the end, and counted.

``batch_ray.py`` has the engines that do the work.
"""

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from revmux_vllm.errors import UserError
from revmux_vllm.serving.parquet import (
    Slice,
    answer_columns,
    count_rows,
    find_files,
    open_parquet,
)

MANIFEST = "run.json"


@dataclass(frozen=True)
class Run:
    """What the parts in a folder depend on; ``run.json``. ``num_bytes``: of the input's files."""

    input: str
    rows: int
    num_bytes: int
    model: str
    text_column: str
    rows_per_partition: int
    prefix: str

    @property
    def answer_columns(self) -> list[str]:
        """Names of the columns that its parts have beside the input's."""
        return answer_columns(self.prefix)


@dataclass(frozen=True)
class Partition:
    """The rows of one part, perhaps of several files."""

    index: int
    slices: list[Slice]

    @property
    def rows(self) -> int:
        """How many."""
        return sum(one.stop - one.start for one in self.slices)

    def part(self, output: Path) -> Path:
        """The file that its answers are written to."""
        return output / f"part-{self.index:05d}.parquet"


def describe(
    source: Path, model: str, text_column: str, rows_per_partition: int, prefix: str
) -> tuple[Run, list[Partition]]:
    """What there is to do.

    Raises:
        UserError: if the input or the model cannot be used, with the cure.
    """
    # It brings torch, which a worker must not import before its threads are set.
    from revmux_vllm.serving.options import locate

    files = [path.resolve() for path in find_files(source)]
    counts = count_rows(files, text_column, answer_columns(prefix))
    run = Run(
        input=str(source.resolve()),
        rows=sum(counts),
        num_bytes=sum(path.stat().st_size for path in files),
        model=locate(model)[0],
        text_column=text_column,
        rows_per_partition=rows_per_partition,
        prefix=prefix,
    )
    paths = [str(path) for path in files]
    return run, plan(list(zip(paths, counts, strict=True)), rows_per_partition)


def plan(files: Sequence[tuple[str, int]], rows_per_partition: int) -> list[Partition]:
    """Ranges of as many rows, the last one shorter; ``files`` have their row counts beside them."""
    partitions: list[Partition] = []
    slices: list[Slice] = []
    room = rows_per_partition
    for path, rows in files:
        start = 0
        while start < rows:
            stop = min(rows, start + room)
            slices.append(Slice(path, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                partitions.append(Partition(len(partitions), slices))
                slices, room = [], rows_per_partition
    if slices:
        partitions.append(Partition(len(partitions), slices))
    return partitions


@contextmanager
def claimed(output: Path, run: Run) -> Iterator[None]:
    """Inside, the folder is this run's alone, and every part in it is one of this run's.

    Raises:
        UserError: if it has parts of something else, or another process is writing there.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            cure = "let it end first"
            raise UserError(f"{output}", "another run is writing there", cure=cure) from error
        except OSError:
            pass  # a file system without locks
        _check_manifest(output, run)
        for left_over in output.glob(".part-*.tmp"):
            left_over.unlink(missing_ok=True)
        yield


def _check_manifest(output: Path, run: Run) -> None:
    manifest, cure = output / MANIFEST, "choose another folder"
    if not manifest.exists():
        if any(output.glob("part-*.parquet")):
            raise UserError(f"{output}", f"has parts, but no {MANIFEST}", cure=cure)
        unfinished = output / f".{MANIFEST}.tmp"
        unfinished.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(manifest)
        return
    try:
        there = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{manifest}", f"cannot be read ({error})", cure=cure) from error
    here = asdict(run)
    if different := [key for key in here if there.get(key) != here[key]]:
        changes = "; ".join(
            f"{key} {there.get(key)!r} there, {here[key]!r} now" for key in different
        )
        raise UserError(
            f"{output}",
            f"holds parts of another run ({changes}). Choose another folder, delete this one, or "
            "repeat the command that it was begun with",
        )


def is_done(partition: Partition, output: Path) -> bool:
    """Whether its part can be read and has all rows: a damaged one is made again."""
    path = partition.part(output)
    if not path.exists():
        return False
    try:
        with open_parquet(path) as file:
            return bool(file.metadata.num_rows == partition.rows)
    except UserError:
        return False


def count_labels(partitions: list[Partition], output: Path, column: str) -> Counter[str | None]:
    """Of all parts, those of earlier runs too."""
    counts: Counter[str | None] = Counter()
    for partition in partitions:
        with open_parquet(partition.part(output)) as file:
            counts.update(file.read([column])[column].to_pylist())
    return counts
