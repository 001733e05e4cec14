"""``revmux batch``: partitions, parts and what is refused, without Ray; then all of it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("ray")

import pyarrow as pa
import pyarrow.parquet as pq

from revmux_vllm.cli import app
from revmux_vllm.errors import UserError
from revmux_vllm.problems import Problem
from revmux_vllm.serving import batch, batch_ray, parquet
from revmux_vllm.terminal import as_flag

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE = EXAMPLES / "ray_data_classify.py"
SENTENCES = (EXAMPLES / "sentences.txt").read_text(encoding="utf-8").splitlines()
POSITIVE = "A warm, funny and beautifully acted film that I would gladly watch again."
NEGATIVE = "The plot makes no sense and the jokes are painfully dull."
NO_TEXTS = [None, "", " \n\u3000"]
ANSWERS = ["label", "probability", "probs"]


def write(path: Path, texts: list[str | None], row_group: int | None = None, **more: Any) -> Path:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string()), **more})
    pq.write_table(table, path, row_group_size=row_group)
    return path


def numbers(count: int) -> list[str]:
    return [f"text {i}" for i in range(count)]


def a_run(**changes: Any) -> batch.Run:
    values = dict(
        input="in", rows=10, num_bytes=99, model="m", text_column="text", rows_per_partition=4
    )
    return batch.Run(**{**values, "prefix": "", **changes})


def invoke(*arguments: Any) -> tuple[int, str]:
    """Exit status and what the command says, without line breaks."""
    result = CliRunner().invoke(app, ["batch", *(str(one) for one in arguments)])
    return result.exit_code, " ".join(result.output.split())


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 12))
def test_partitions_cover_every_row_once_and_in_order(counts: list[int], size: int) -> None:
    partitions = batch.plan([(str(i), rows) for i, rows in enumerate(counts)], size)
    rows = [
        (one.path, row)
        for partition in partitions
        for one in partition.slices
        for row in range(one.start, one.stop)
    ]
    assert rows == [(str(i), row) for i, count in enumerate(counts) for row in range(count)]
    assert [partition.index for partition in partitions] == list(range(len(partitions)))
    assert all(partition.rows == size for partition in partitions[:-1])


@pytest.mark.parametrize("row_group", [1, 3, 7, 100])
def test_rows_are_read_across_row_groups_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int
) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 4)
    path = write(tmp_path / "a.parquet", numbers(25), row_group)
    for start, stop in ((0, 25), (0, 1), (5, 6), (6, 21), (24, 25)):
        table = parquet.read_rows(parquet.Slice(str(path), start, stop))
        assert table["id"].to_pylist() == list(range(start, stop))


def test_files_of_a_folder_are_read_by_name(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "_c.parquet", ".d.parquet", "e.csv"):
        write(tmp_path / name, numbers(1))
    assert [path.name for path in parquet.find_files(tmp_path)] == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_texts_of_any_kind_of_column(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["one", None, "", "\t", "two"]).cast(kind)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    parquet.count_rows([tmp_path / "a.parquet"], "text", ANSWERS)
    table = parquet.read_rows(parquet.Slice(str(tmp_path / "a.parquet"), 0, 5))
    assert parquet.texts_of(table["text"]) == ["one", None, None, None, "two"]


def test_bytes_that_are_no_utf8_do_not_end_a_run() -> None:
    column = pa.chunked_array([pa.array([b"fine \xff"]).view(pa.string())])
    assert parquet.texts_of(column) == ["fine \ufffd"]


def test_answers_stand_beside_their_rows() -> None:
    table = pa.table({"text": ["a", None, "b"]})
    probs = [[0.25, 0.75], None, [0.5, 0.25]]
    answered = parquet.with_answers(table, probs, {0: "no", 1: "yes"}, ANSWERS)
    assert answered["label"].to_pylist() == ["yes", None, "no"]
    assert answered["probability"].to_pylist() == [0.75, None, 0.5]
    assert answered["probs"].to_pylist() == probs


def test_several_labels_stand_together() -> None:
    table = pa.table({"text": ["a", "b", None]})
    probs = [[0.9, 0.2, 0.6], [0.1, 0.2, 0.3], None]
    labels = {0: "toxic", 1: "insult", 2: "threat"}
    answered = parquet.with_answers(table, probs, labels, ANSWERS, Problem.LABELS)
    assert answered["label"].to_pylist() == ["toxic,threat", "", None]


def test_one_output_says_yes_or_no_and_values_say_neither() -> None:
    table, probs = pa.table({"text": ["a", "b", None]}), [[0.75], [0.25], None]
    answered = parquet.with_answers(table, probs, {0: "yes"}, ANSWERS)
    assert answered["label"].to_pylist() == ["yes", "no", None]
    assert answered["probability"].to_pylist() == [0.75, 0.75, None]
    answered = parquet.with_answers(table, probs, {0: "score"}, ANSWERS, Problem.VALUES)
    assert answered["label"].to_pylist() == ["", "", None]
    assert answered["probability"].to_pylist() == [None] * 3
    assert answered["probs"].to_pylist() == probs


def test_a_part_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = batch.Partition(3, [parquet.Slice("in", 0, 2)])
    path = partition.part(tmp_path)
    assert path.name == "part-00003.parquet"
    assert not batch.is_done(partition, tmp_path)

    def fail_after_some_bytes(table: pa.Table, file: Any) -> None:
        file.write(b"PAR1")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(parquet.pq, "write_table", fail_after_some_bytes)
        with pytest.raises(OSError, match="disk full"):
            parquet.write_whole(pa.table({"text": ["a", "b"]}), path)
    assert list(tmp_path.iterdir()) == []
    parquet.write_whole(pa.table({"text": ["a", "b"]}), path)
    assert batch.is_done(partition, tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    assert not batch.is_done(partition, tmp_path), "cut off"
    parquet.write_whole(pa.table({"text": ["a"]}), path)
    assert not batch.is_done(partition, tmp_path), "a row is missing"
    damaged(tmp_path).rename(path)
    assert not batch.is_done(batch.Partition(3, [parquet.Slice("in", 0, 1)]), tmp_path), "damaged"


def test_a_folder_is_taken_up_again_by_the_same_run(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with batch.claimed(output, a_run()):
        assert json.loads((output / "run.json").read_text())["rows"] == 10
        (output / ".part-00001.0f.tmp").touch()
    with batch.claimed(output, a_run()):
        assert not (output / ".part-00001.0f.tmp").exists(), "left over"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows_per_partition": 5}, "rows_per_partition 4 there, 5 now"),
        ({"model": "other"}, "model 'm' there, 'other' now"),
        ({"input": "else", "num_bytes": 7}, "input 'in' there, 'else' now; num_bytes 99 there, 7"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with batch.claimed(tmp_path, a_run()):
        pass
    with (
        pytest.raises(ValueError, match=rf"{said}.*Choose another folder"),
        batch.claimed(tmp_path, a_run(**changes)),
    ):
        pass


def test_parts_of_nobody_are_refused(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").touch()
    with (
        pytest.raises(ValueError, match=r"no run\.json; choose another folder"),
        batch.claimed(tmp_path, a_run()),
    ):
        pass


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        batch.claimed(tmp_path, a_run()),
        pytest.raises(ValueError, match="another run"),
        batch.claimed(tmp_path, a_run()),
    ):
        pass
    with batch.claimed(tmp_path, a_run()):
        pass


def empty_folder(root: Path) -> Path:
    return root


def not_parquet(root: Path) -> Path:
    (root / "rows.csv").write_text("text\nhello\n")
    return root / "rows.csv"


def damaged(root: Path) -> Path:
    """Parquet at both ends, and nonsense where its schema should be."""
    path = write(root / "a.parquet", ["a"])
    content = bytearray(path.read_bytes())
    content[-40:-8] = b"\xff" * 32
    path.write_bytes(content)
    return path


def without_text(root: Path) -> Path:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), root / "a.parquet")
    return root / "a.parquet"


def number_as_text(root: Path) -> Path:
    pq.write_table(pa.table({"text": [1]}), root / "a.parquet")
    return root / "a.parquet"


def with_label(root: Path) -> Path:
    return write(root / "a.parquet", ["a"], label=["positive"])


def of_two_kinds(root: Path) -> Path:
    write(root / "a.parquet", ["a"])
    write(root / "b.parquet", ["a"], stars=[5])
    return root


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: root / "nowhere.parquet", "no such file or folder"),
        (empty_folder, "no *.parquet file lies directly in this folder"),
        (not_parquet, "not a Parquet file"),
        (damaged, "a.parquet: not a Parquet file (Couldn't deserialize thrift"),
        (without_text, "no column 'text'; --text-column names one of: body, id"),
        (number_as_text, "column 'text' holds int64, not texts"),
        (with_label, "`--prefix answer_`"),
        (of_two_kinds, "b.parquet: its columns (id, text, stars)"),
    ],
)
def test_input_that_cannot_be_read_is_refused_with_the_cure(
    tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    status, output = invoke(make(tmp_path), tmp_path / "out")
    assert (status, said in output) == (2, True), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--llm-args", "dtype=float32"], "not JSON"),
        (["--llm-args", "[]"], "expected a JSON object"),
        (["--llm-args", '{"model": "x"}'], "--model names"),
        (["--model", "no-such-model"], "bundled: revmux-llama"),
        (["--cpus-per-replica", "-1"], "--cpus-per-replica -1: expected 0 or more"),
        (["--address", "nonsense"], "--address nonsense: Invalid address format"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, options: list[str], said: str
) -> None:
    source = write(tmp_path / "a.parquet", numbers(3))
    status, output = invoke(source, tmp_path / "out", *options)
    assert (status, said in output) == (2, True), output


def test_output_is_not_input(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", numbers(3))
    status, output = invoke(tmp_path, tmp_path)
    assert (status, "choose another" in output) == (2, True), output


def test_without_ray_the_cure_is_named() -> None:
    code = "import sys; sys.modules['ray'] = None; from revmux_vllm.cli import app; app()"
    command = [sys.executable, "-c", code, "batch", "in.parquet", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install -e '.[ray]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("resources", "llm_args", "gpus"),
    [
        ({"CPU": 2.0}, {}, 0),
        ({"CPU": 2.0, "GPU": 2.0}, {}, 1),
        ({"CPU": 2.0, "GPU": 4.0}, {"tensor_parallel_size": 2}, 2),
    ],
)
def test_an_engine_takes_gpus_if_there_are_any(
    resources: dict[str, float], llm_args: dict[str, Any], gpus: int
) -> None:
    assert batch_ray.Engines(2, 1.0, llm_args, None).gpus(resources) == gpus


@pytest.mark.parametrize("resources", [{"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}])
def test_a_cluster_without_room_is_refused(resources: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"replicas 2: 2 (CPU|GPU)s are needed at 1 each") as caught:
        batch_ray.Engines(2, 1.0, {}, None).gpus(resources)
    said = caught.value.words(as_flag, typed=True)
    assert re.match(r"--replicas 2: 2 (CPU|GPU)s are needed at 1 each", said)


def test_where_all_is_done_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(batch_ray.ray, "init")
    source = write(tmp_path / "a.parquet", numbers(5))
    run, partitions = batch.describe(source, "revmux-llama", "text", 3, "")
    for partition in partitions:
        table = parquet.read_rows(partition.slices[0])
        probs = [None, *[[0.9, 0.1]] * (len(table) - 1)]
        answered = parquet.with_answers(table, probs, {0: "no"}, ANSWERS)
        parquet.write_whole(answered, partition.part(tmp_path))
    status, output = invoke(source, tmp_path, "--rows-per-partition", 3)
    assert (status, "has parts, but no run.json" in output) == (2, True), output
    with batch.claimed(tmp_path / "out", run):
        for partition in partitions:
            partition.part(tmp_path).rename(partition.part(tmp_path / "out"))
    status, output = invoke(source, tmp_path / "out", "--rows-per-partition", 3)
    assert status == 0
    assert "2 of 2 partitions are there already: skipped" in output
    assert "5 rows in" in output
    assert "no │ 3" in output


def test_of_a_workers_traceback_the_cause_is_said() -> None:
    text = """ray::MapWorker.submit() (pid=7)
  File "worker.py", line 3, in call
    self.llm = start()
               ^^^^^^^
ValueError: no room
--max-model-len is the cure

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block."""
    assert batch_ray.said_last(text) == "ValueError: no room\n--max-model-len is the cure"
    assert (
        batch_ray.said_last("The actor died.\n\tactor_id: 5\n") == "The actor died.\n\tactor_id: 5"
    )
    ours = text.replace("ValueError", "revmux_vllm.errors.UserError")
    assert batch_ray.said_last(ours) == "no room\n--max-model-len is the cure"


def start(source: Path, output: Path, rows_per_partition: int) -> subprocess.Popen[str]:
    """The command as a user runs it."""
    eager = json.dumps({"enforce_eager": True})
    revmux = str(Path(sys.executable).with_name("revmux"))
    command = [revmux, "batch", str(source), str(output), "--llm-args", eager]
    command += ["--rows-per-partition", str(rows_per_partition), "--json"]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def summary_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """All that it wrote on standard output, once it has ended."""
    try:
        stdout, stderr = process.communicate(timeout=400)
    finally:
        process.terminate()
    assert process.returncode == 0, stderr[-3000:]
    return json.loads(stdout)


def written(output: Path) -> dict[str, int]:
    """When each part was."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(output.glob("part-*"))}


def test_a_folder_of_files_is_classified_and_a_run_is_resumed(tmp_path: Path) -> None:
    texts = [POSITIVE, NEGATIVE, *NO_TEXTS, "good " * 3000, *SENTENCES]
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write(source / "a.parquet", texts[:150], row_group=64)
    write(source / "b.parquet", texts[150:])

    summary = summary_of(start(source, output, 60))
    names = [f"part-{i:05d}.parquet" for i in range(6)]
    first = written(output)
    assert list(first) == names
    table = pa.concat_tables(pq.read_table(output / name) for name in names)
    assert table.column_names == ["id", "text", *ANSWERS]
    assert table["text"].to_pylist() == texts
    labels = table["label"].to_pylist()
    assert labels[:6] == ["positive", "negative", None, None, None, "positive"]
    for row in table.to_pylist():
        if row["text"] in NO_TEXTS:
            assert [row[name] for name in ANSWERS] == [None] * 3
            continue
        assert row["probability"] == max(row["probs"]) >= 0.5
        assert row["label"] == ("negative", "positive")[row["probs"].index(row["probability"])]
    counts = {name: labels.count(name) for name in ("positive", "negative")}
    assert summary["labels"] == counts
    assert (summary["rows"], summary["partitions"], summary["no_text"]) == (len(texts), 6, 3)
    assert (summary["partitions_skipped"], summary["texts_at_full_length"]) == (0, 1)

    for name in (names[1], names[4]):
        (output / name).unlink()
    again = summary_of(start(source, output, 60))
    second = written(output)
    assert list(second) == names
    assert {name for name in names if first[name] != second[name]} == {names[1], names[4]}
    assert (again["partitions_skipped"], again["rows_classified"]) == (4, 120)
    assert sum(again["labels"].values()) == len(texts) - 3


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_killed_run_resumed(tmp_path: Path) -> None:
    texts = SENTENCES * 20
    source, output = write(tmp_path / "a.parquet", texts), tmp_path / "out"

    def wait_for_parts(count: int) -> None:
        end = time.monotonic() + 200
        while len(written(output)) < count and time.monotonic() < end:
            time.sleep(0.2)
        assert len(written(output)) >= count

    def engine(process: subprocess.Popen[str]) -> psutil.Process:
        children = psutil.Process(process.pid).children(recursive=True)
        return next(c for c in children if c.cmdline()[:1] and "ray::MapWorker" in c.cmdline()[0])

    process = start(source, output, 200)
    wait_for_parts(1)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "interrupted; the same command goes on" in stderr

    process = start(source, output, 200)
    wait_for_parts(len(written(output)) + 2)
    last = engine(process)
    process.kill()
    process.communicate()
    psutil.wait_procs([last], timeout=30)
    assert not last.is_running(), "the engine ends with its driver"
    there = written(output)
    assert 2 <= len(there) < 32

    process = start(source, output, 200)
    wait_for_parts(len(there) + 2)
    engine(process).kill()
    summary = summary_of(process)
    assert summary["partitions_skipped"] == len(there)
    assert summary["rows_classified"] == len(texts) - 200 * len(there)
    assert there.items() <= written(output).items()
    table = pa.concat_tables(pq.read_table(output / name) for name in written(output))
    assert table["id"].to_pylist() == list(range(len(texts)))
    assert table["label"].null_count == 0


def test_the_example_says_what_it_does() -> None:
    command = [sys.executable, str(EXAMPLE), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Classify a Parquet file with Ray Data" in done.stdout


@pytest.mark.slow
def test_the_example_classifies_a_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", [POSITIVE, NEGATIVE, "good " * 3000])
    command = [sys.executable, str(EXAMPLE), str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pq.read_table(tmp_path / "out").sort_by("id")
    best = [max(range(2), key=probs.__getitem__) for probs in table["probs"].to_pylist()]
    assert best == [1, 0, 1]
