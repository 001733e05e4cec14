"""Classify a Parquet file, or a folder of them, with Ray Data; an interrupted run can be resumed.

``pip install -e '.[ray]'``, then ``python examples/ray_data_classify.py INPUT OUTPUT``.

* **A partition is a range of rows** of the input in file order, files in order of name, and one
  file of the output: ``part-00000.parquet`` has the rows of the first one in their order, with all
  columns of the input and ``label``, ``probability`` (of that label) and ``probs`` (of all labels).
* **A part is there whole or not at all**: it is written beside its place and renamed. So a run that
  was interrupted in any way is resumed by the same command, which skips the parts that are there.
  ``run.json`` keeps what parts depend on, and a command that differs in it is refused.
  ``--llm-args`` are not kept: they may be what has to change before a run can go on.
* **Ray Data distributes partitions, not rows.** A worker gets file names and row numbers, reads
  these rows itself, writes the part and returns counts. So the driver holds no texts, and a worker
  that is killed costs the partition it had: Ray starts another, which classifies it again. On more
  than one machine INPUT, OUTPUT and the model therefore lie on a file system that all of them have.
* **One process per engine**: vLLM's own processes are folded into Ray's worker, so whatever kills
  one of them is seen by Ray, and nothing outlives a killed worker.
* **Texts** that are null, empty or blank get null for an answer, since the model has nothing to say
  about them. Texts longer than the model takes are cut at the end, and counted.
* **One file**: Ray sends workers what the script defines, and needs nothing installed there but
  this package.

``ray.data.llm`` would do some of this, but the extra it needs, ``ray[llm]``, pins vLLM 0.29, and
its stages ask for GPUs.
"""

import fcntl
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from revmux_vllm.serving import RAY_IS_MISSING
from revmux_vllm.terminal import fail, make_console, mendable_errors, unwound_on_sigterm

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
except ImportError as error:
    raise SystemExit(f"error: {RAY_IS_MISSING} ({error})") from error

MANIFEST = "run.json"
BATCH_ROWS = 16_384
LINE_EVERY_S = 10.0
RETRIES = 3
"""How often a partition is tried again whose worker was killed: it may be what kills it."""


def answer_columns(prefix: str) -> list[str]:
    return [f"{prefix}{name}" for name in ("label", "probability", "probs")]


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
        return answer_columns(self.prefix)


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop`` of one file."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Partition:
    index: int
    slices: list[Slice]

    @property
    def rows(self) -> int:
        return sum(one.stop - one.start for one in self.slices)

    def part(self, output: Path) -> Path:
        return output / f"part-{self.index:05d}.parquet"


@dataclass(frozen=True)
class Engines:
    """How many, what each of them has, and where."""

    replicas: int
    cpus: float
    llm_args: dict[str, Any]
    address: str | None

    def gpus(self, resources: dict[str, float]) -> float:
        """Of each engine, on a cluster with these resources.

        Raises:
            ValueError: if there is no room for all engines: Ray would wait for it forever.
        """
        gpus = self.llm_args.get("tensor_parallel_size", 1) if resources.get("GPU") else 0
        for kind, each in (("CPU", self.cpus), ("GPU", gpus)):
            needed, there = self.replicas * each, resources.get(kind, 0)
            if needed > there:
                raise ValueError(
                    f"--replicas {self.replicas}: {needed:g} {kind}s are needed at {each:g} each, "
                    f"and the cluster has {there:g}; ask for fewer replicas, or for less of each"
                )
        return gpus


def find_files(source: Path) -> list[Path]:
    """The Parquet files that ``source`` is or holds, in order of name.

    Raises:
        ValueError: if there are none.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder; INPUT is a Parquet file, or a folder")
    files = [source]
    if source.is_dir():
        files = sorted(p for p in source.glob("*.parquet") if not p.name.startswith(("_", ".")))
    if not files:
        raise ValueError(f"{source}: no *.parquet file lies directly in this folder")
    return files


def open_parquet(path: str | Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: not a Parquet file ({error}); for CSV, `pyarrow.csv.read_csv` and "
            "`pyarrow.parquet.write_table` make one"
        ) from error


def check_schema(schema: pa.Schema, text_column: str, answer_columns: list[str]) -> None:
    """Raise ValueError unless there are texts, and room for the answers."""
    names = ", ".join(schema.names)
    if text_column not in schema.names:
        raise ValueError(f"no column {text_column!r}; --text-column names one of: {names}")
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(kind) for check in is_text):
        raise ValueError(
            f"column {text_column!r} holds {kind}, not texts; --text-column names one of: {names}"
        )
    if taken := [name for name in answer_columns if name in schema.names]:
        raise ValueError(
            f"the input has columns named as the answers are: {', '.join(taken)}; with "
            "`--prefix answer_` the answers are named answer_label and so on"
        )


def count_rows(files: Sequence[Path], text_column: str, answer_columns: list[str]) -> list[int]:
    """Rows of each file, once all of them can be read together.

    Raises:
        ValueError: naming the file that cannot, and the cure.
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
            raise ValueError(
                f"{path}: its columns ({', '.join(schema.names)}) or their types are not those of "
                f"{files[0]} ({', '.join(first.names)}); classify them into folders of their own"
            )
        counts.append(rows)
    return counts


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
        ValueError: if it has parts of something else, or another process is writing there.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{output}: another run is writing there; let it end first") from error
        except OSError:
            pass  # a file system without locks
        _check_manifest(output, run)
        for left_over in output.glob(".part-*.tmp"):
            left_over.unlink(missing_ok=True)
        yield


def _check_manifest(output: Path, run: Run) -> None:
    manifest = output / MANIFEST
    if not manifest.exists():
        if any(output.glob("part-*.parquet")):
            raise ValueError(f"{output}: has parts, but no {MANIFEST}; choose another folder")
        unfinished = output / f".{MANIFEST}.tmp"
        unfinished.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(manifest)
        return
    try:
        there = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{manifest}: cannot be read ({error}); choose another folder") from error
    here = asdict(run)
    if different := [key for key in here if there.get(key) != here[key]]:
        changes = "; ".join(
            f"{key} {there.get(key)!r} there, {here[key]!r} now" for key in different
        )
        raise ValueError(
            f"{output}: holds parts of another run ({changes}). Choose another folder, delete this "
            "one, or repeat the command that it was begun with"
        )


def is_done(partition: Partition, output: Path) -> bool:
    """Whether its part can be read and has all rows: a damaged one is made again."""
    path = partition.part(output)
    try:
        return path.exists() and pq.read_metadata(path).num_rows == partition.rows
    except pa.ArrowInvalid:
        return False


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
) -> pa.Table:
    """The table with three more columns; rows whose ``probs`` are None have null in all of them."""
    best = [None if p is None else max(range(len(p)), key=p.__getitem__) for p in probs]
    label = [None if i is None else labels[i] for i in best]
    probability = [None if p is None else max(p) for p in probs]
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


class Classifier:
    """An engine in a worker of Ray's; called with a partition, it leaves a part in ``output``."""

    def __init__(self, run: Run, output: Path, llm_args: dict[str, Any], threads: int) -> None:
        self.run, self.output, self.llm_args, self.threads = run, output, llm_args, threads
        # Made with the first partition: Ray reports what fails in here with pages of its own.
        self.llm: Any = None

    def start_engine(self) -> Any:
        # Before vLLM is imported. On CPUs it would bind all engines of a machine to the same cores.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if not (self.output / MANIFEST).exists():
            raise ValueError(
                f"{self.output} of the driver is not there on a worker's machine; OUTPUT has to be "
                "a folder that all machines have"
            )
        from vllm import LLM

        return LLM(model=self.run.model, **self.llm_args)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Counts, and when it began: what the driver shows."""
        self.llm = self.llm or self.start_engine()
        config = self.llm.llm_engine.model_config
        began = time.time()
        partition = Partition(row["index"], [Slice(**one) for one in row["slices"]])
        table = pa.concat_tables(read_rows(one) for one in partition.slices)
        texts = texts_of(table[self.run.text_column])
        # To as many tokens as the model takes; vLLM refuses longer ones otherwise.
        cut = {"truncate_prompt_tokens": -1}
        outputs = self.llm.classify(
            [text for text in texts if text is not None], use_tqdm=False, tokenization_kwargs=cut
        )
        answers = iter(outputs)
        probs = [None if text is None else next(answers).outputs.probs for text in texts]
        answered = with_answers(table, probs, config.hf_config.id2label, self.run.answer_columns)
        write_whole(answered, partition.part(self.output))
        full = sum(len(output.prompt_token_ids) == config.max_model_len for output in outputs)
        return {"rows": len(table), "full_length": full, "began": began}


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """The one at ``address``, or one that ends with the block."""
    # Each run would begin with a line on arguments of actors, which are Ray Data's own and kept.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("progress", "execution.streaming_executor", "execution.streaming_executor_state"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # said once, by classify
    # Without the workers' logs, which would land on standard output.
    ray.init(address or "local", logging_level="ERROR", log_to_driver=False)
    try:
        with unwound_on_sigterm():  # in here, because Ray sets a handler of its own
            yield
    finally:
        ray.shutdown()


def classify(
    run: Run, partitions: list[Partition], output: Path, engines: Engines
) -> Iterator[dict[str, Any]]:
    """What ``Classifier`` returns, partition by partition as they are done.

    Raises:
        ValueError: if they cannot be, with the reason.
    """
    try:
        gpus = engines.gpus(ray.cluster_resources())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # else a partition has half an hour at most
        # Reading an engine's memory maps every second takes a tenth of its time.
        context.memory_usage_poll_interval_s = None
        # Ray Data has no other way to limit retries; our extra stays below 2.64, which drops it.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        # One partition a block: blocks are what Ray hands out, repeats and reports.
        dataset = ray.data.from_items(
            [asdict(partition) for partition in partitions], override_num_blocks=len(partitions)
        ).map(
            Classifier,
            fn_constructor_args=(run, output, engines.llm_args, max(1, int(engines.cpus))),
            compute=ray.data.ActorPoolStrategy(
                size=min(engines.replicas, len(partitions)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=engines.cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for values in zip(*(column.tolist() for column in batch.values()), strict=True):
                yield dict(zip(batch, values, strict=True))
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"a worker failed: {said_last(str(error))}\nThe logs of workers are worker-*.err in "
            "/tmp/ray/session_latest/logs of their machines. Parts that are done stay: the same "
            "command goes on, with other --llm-args too"
        ) from error


def said_last(text: str) -> str:
    """The message that the innermost traceback ends with, or all of a text that has none."""
    lines = text.strip().partition("\n\nThe above exception")[0].splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    start = frames[-1] + 1 if frames else 0
    return "\n".join(dropwhile(lambda line: line.startswith("  "), lines[start:]))


class Watch:
    """A bar of rows on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        columns = (SpinnerColumn(), "{task.description}", BarColumn(), MofNCompleteColumn())
        self.console, self.total, self.done, self.next_line = console, total, done, 0.0
        self.bar = Progress(
            *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
        )
        self.task = self.bar.add_task("Starting engines", total=total, completed=done)

    def advance(self, rows: int) -> None:
        self.done += rows
        self.bar.update(self.task, description="Rows classified", completed=self.done)
        now = time.monotonic()
        if self.bar.disable and (now >= self.next_line or self.done == self.total):
            self.console.print(f"{self.done} of {self.total} rows", highlight=False)
            self.next_line = now + LINE_EVERY_S


def work(
    run: Run, partitions: list[Partition], output: Path, engines: Engines, console: Console
) -> dict[str, Any]:
    """Classify what is not there yet; the summary that ``--json`` prints."""
    todo = [partition for partition in partitions if not is_done(partition, output)]
    rows = sum(partition.rows for partition in todo)
    skipped = len(partitions) - len(todo)
    if skipped:
        console.print(f"{skipped} of {len(partitions)} partitions are there already: skipped")
    watch = Watch(console, run.rows, run.rows - rows)
    full, started, first = 0, time.time(), float("inf")
    if todo:
        with ray_cluster(engines.address), watch.bar:
            for done in classify(run, todo, output, engines):
                first = min(first, done["began"])
                full += done["full_length"]
                watch.advance(done["rows"])
    ended = time.time()
    labels = count_labels(partitions, output, run.answer_columns[0])
    no_text = labels.pop(None, 0)
    return {
        "input": run.input,
        "output": str(output),
        "model": run.model,
        "rows": run.rows,
        "partitions": len(partitions),
        "partitions_skipped": skipped,
        "rows_classified": rows,
        "seconds": ended - started,
        "start_s": first - started if todo else 0.0,
        "rows_per_s": rows / (ended - first) if todo else 0.0,
        "labels": dict(labels.most_common()),
        "no_text": no_text,
        "texts_at_full_length": full,
    }


def count_labels(partitions: list[Partition], output: Path, column: str) -> Counter[str | None]:
    """Of all parts, those of earlier runs too."""
    counts: Counter[str | None] = Counter()
    for partition in partitions:
        with open_parquet(partition.part(output)) as file:
            counts.update(file.read([column])[column].to_pylist())
    return counts


def print_summary(summary: dict[str, Any]) -> None:
    console = make_console()
    table = Table("label", "rows")
    table.columns[1].justify = "right"
    for label, rows in summary["labels"].items():
        table.add_row(label, str(rows))
    if summary["no_text"]:
        table.add_row("null (no text)", str(summary["no_text"]), style="dim")
    console.print(table)
    lines = [
        "{rows} rows in {output}; {partitions_skipped} of {partitions} partitions were there.",
        "{rows_classified} rows classified in {seconds:.1f} s: {start_s:.1f} s until the first "
        "engine was ready, then {rows_per_s:.1f} rows/s.",
    ]
    if summary["texts_at_full_length"]:
        lines.append(
            "{texts_at_full_length} texts are as long as the model takes: what was longer was cut."
        )
    console.print("\n".join(lines).format(**summary), highlight=False, soft_wrap=True)


def read_llm_args(text: str) -> dict[str, Any]:
    """Raises ValueError unless it is a JSON object that leaves the model to ``--model``."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--llm-args {text}: not JSON ({error})") from error
    if not isinstance(values, dict) or "model" in values:
        raise ValueError(
            f"--llm-args {text}: expected a JSON object without `model`, which --model names, for "
            """example '{"dtype": "float32"}'"""
        )
    return values


def describe(
    source: Path, model: str, text_column: str, rows_per_partition: int, prefix: str
) -> tuple[Run, list[Partition]]:
    """What there is to do.

    Raises:
        ValueError: if the input or the model cannot be used, with the cure.
    """
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


def main(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Parquet file, or a folder with *.parquet in it."),
    ],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUTPUT", help="Folder for the parts; made if it is not there."),
    ],
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, bundled name or hub id.")
    ] = "revmux-llama",
    text_column: Annotated[str, typer.Option(help="Column that holds the texts.")] = "text",
    prefix: Annotated[
        str, typer.Option(help="Put before `label`, `probability` and `probs` of the output.")
    ] = "",
    rows_per_partition: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rows of one part: what an interruption loses per engine. Thousands, because "
            "an engine packs what waits, and nothing waits at a partition's end.",
        ),
    ] = 2000,
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    cpus_per_replica: Annotated[
        float, typer.Option(help="CPUs of one engine, and threads that it computes with on CPUs.")
    ] = 1.0,
    llm_args: Annotated[
        str,
        typer.Option(
            help='Keyword arguments of vLLM\'s `LLM` as JSON: \'{"dtype": "float32"}\'. '
            "Engines take one GPU each if the cluster has any, or `tensor_parallel_size` of them."
        ),
    ] = "{}",
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, `auto` for this machine's. Default: a new one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, no tables.")] = False,
) -> None:
    """Classify the texts of INPUT and write its rows with their answers to OUTPUT.

    Example: `python examples/ray_data_classify.py reviews.parquet answers --replicas 2`.
    Interrupted, by Ctrl-C or worse? The same command goes on where it ended.
    """
    console = make_console(stderr=True)
    with mendable_errors():
        arguments = read_llm_args(llm_args)
        if source.resolve() == output.resolve():
            raise ValueError(f"{output} is INPUT too, and parts would become input; choose another")
        run, partitions = describe(source, model, text_column, rows_per_partition, prefix)
        engines = Engines(replicas, cpus_per_replica, arguments, address)
        try:
            # Ray prints on standard output what becomes of its processes.
            with claimed(output, run), redirect_stdout(sys.stderr):
                summary = work(run, partitions, output.resolve(), engines, console)
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on where this one ended")
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


if __name__ == "__main__":
    typer.run(main)
