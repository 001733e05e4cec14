"""Every mistake in a file is named with its row before training starts."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from revmux_vllm.training import data
from revmux_vllm.training.losses import UNLABELLED

NAMES = ["negative", "positive"]


def write(tmp_path: Path, content: str | bytes, suffix: str = ".tsv") -> Path:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_single_texts_and_pairs(tmp_path: Path) -> None:
    rows = data.read_rows(write(tmp_path, 'label\ttext\n1\tfine\n0\t"odd" quote\n'), NAMES)
    assert (rows.texts, rows.labels) == (["fine", '"odd" quote'], [1, 0])
    rows = data.read_rows(write(tmp_path, "label\ttext_a\ttext_b\n1\ta\tb\n0\tc\td\n"), NAMES)
    assert rows.texts == [("a", "b"), ("c", "d")]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    texts, labels = ['one, "two"\nthree', "four"], ["positive", "negative"]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    lines = [json.dumps({"text": t, "label": n}) for t, n in zip(texts, labels, strict=True)]
    csv = 'text,label\n"one, ""two""\nthree",positive\nfour,negative\n'
    for source in (
        path,
        write(tmp_path, "\n".join(lines), ".jsonl"),
        write(tmp_path, csv, ".csv"),
    ):
        assert data.read_rows(source, NAMES) == data.LabelledText(texts, [1, 0])


def test_marks_and_separators_of_other_programs(tmp_path: Path) -> None:
    """A byte order mark, CRLF, and U+2028, which Python's splitlines takes for a line's end."""
    expected = data.LabelledText(["a\u2028b", "c"], [0, 1])
    for suffix, content in (
        (".csv", "\ufefflabel,text\r\n0,a\u2028b\r\n1,c\r\n"),
        (".tsv", "\ufefflabel\ttext\r\n0\ta\u2028b\r\n1\tc\r\n"),
        (".jsonl", '{"label": 0, "text": "a\u2028b"}\r\n{"label": 1, "text": "c"}\n'),
    ):
        assert data.read_rows(write(tmp_path, content, suffix), NAMES) == expected


def test_a_question_beside_a_sentence_is_a_pair(tmp_path: Path) -> None:
    path = write(tmp_path, "question\tsentence\tlabel\nwho\tme\t0\nhow\tso\t1\n")
    assert data.read_rows(path, NAMES).texts == [("who", "me"), ("how", "so")]


def test_a_data_set_of_the_datasets_library(tmp_path: Path, monkeypatch: Any) -> None:
    """Read as a hub data set is; here from a folder, which the library takes in place of a name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / "train.csv").write_text("body,answer\na,0\nb,1\n")
    options: Any = {"text_columns": ["body"], "label_column": "answer"}
    expected = data.LabelledText(["a", "b"], [0, 1])
    assert data.read_rows(f"{folder}:train", NAMES, **options) == expected
    assert data.read_rows(f"{folder}:default:train", NAMES, **options) == expected
    with pytest.raises(ValueError, match="neither a file nor a hub data set that can be read"):
        data.read_rows(f"{folder}:nothing", NAMES, **options)


def test_without_a_label_column_rows_are_unlabelled(tmp_path: Path) -> None:
    path = write(tmp_path, "text\nfine\nbad\n")
    assert data.read_rows(path, NAMES).labels == [UNLABELLED, UNLABELLED]
    with pytest.raises(ValueError, match="expected the columns label or labels; found text"):
        data.read_rows(path, NAMES, need_labels=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "label\tbody\n1\tfine\n",
            "row 1: expected the columns .* or text or sentence; found label, body",
        ),
        ("", "row 1: expected the columns .* found nothing"),
        ("label\ttext\n", "no rows below the header"),
        ("label\ttext\n1\tfine\tmore\n", "row 2: expected 2 fields, found 3; replace"),
        (
            "label\ttext\n1\tfine\n2\tfine\n",
            "row 3: label '2': expected an integer from 0 to 1 .*; indices begin at 0; if yours",
        ),
        ("label\ttext\n1\tfine\n7\tfine\n", "row 3: label '7': .*negative, positive$"),
        ("label\ttext\ngood\tfine\n", "row 2: label 'good': .* negative, positive"),
        ("label\ttext\n1\tfine\nnegative\tbad\n", "row 3: label 'negative': mixed label types"),
        ("label\ttext\n1\t \n", "row 2: empty text"),
        ("label\ttext\n1\tfine\n1\tgood\n", "all 2 rows have the label 'positive'"),
        (b"label\ttext\n1\t\xff\xfe\n", "row 2: not UTF-8 at byte 13"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.read_rows(write(tmp_path, content), NAMES)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".jsonl", '{"text": "a", "label": 0}\n{"text": "b"}\n', "row 2: missing label, .* add it"),
        (
            ".jsonl",
            '{"text": "a", "label": 0}\nnonsense\n',
            "row 2: not JSON: .* one object a line",
        ),
        (
            ".jsonl",
            '{"text": "a", "label": 0}\n[1]\n',
            r"row 2: expected an object with column names, found '\[1\]'",
        ),
        (".jsonl", '{"text": "a", "label": [1]}\n', r"row 1: label \[1\]: expected an integer"),
        (".jsonl", '{"text": "a", "label": 0.5}\n', "row 1: label 0.5: expected an integer"),
        (".jsonl", '{"text": 3, "label": 1}\n', r"row 1: expected text, found \(3,\); write"),
        (".csv", "label,text\n0,a\n1,b,c\n", "row 3: expected 2 fields, found 3; quote"),
        (".csv", 'label,text\n0,a\n1,"b\n0,c\n', "row 3: unexpected end of data; close the quotes"),
        (".parquet", "nonsense", "not a Parquet file"),
        (".xlsx", "nonsense", "expected a file ending in .tsv, .csv, .jsonl, .parquet"),
    ],
)
def test_mistakes_of_other_formats(tmp_path: Path, suffix: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.read_rows(write(tmp_path, content, suffix), NAMES)


MNLI = ["contradiction", "neutral", "entailment"]


def class_label_file(folder: Path, names: list[str], labels: list[int]) -> Path:
    """Parquet as the datasets library writes it: indices, and the names of the classes beside."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"text": [f"row {i}" for i in range(len(labels))], "label": labels}
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def test_classes_of_a_data_set_are_the_backbones_of_the_same_name(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever the order of each, and whatever the format."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = class_label_file(
        tmp_path / "mnli", ["Entailment", "Neutral", "Contradiction"], [0, 1, 2]
    )
    expected = [2, 1, 0]
    assert data.read_rows(path, MNLI).labels == expected
    assert data.read_rows(f"{path.parent}:train", MNLI).labels == expected
    assert data.read_rows(f"{path.parent}:train[1:]", MNLI).labels == expected[1:]
    assert data.read_rows(f"{path.parent}:default:train[:67%]", MNLI).labels == expected[:2]
    named = "label\ttext\nEntailment\ta\nneutral\tb\nCONTRADICTION\tc\n"
    assert data.read_rows(write(tmp_path, named), MNLI).labels == expected


@pytest.mark.parametrize(
    ("backbone", "words"),
    [(["LABEL_0", "LABEL_1"], False), (["bad", "great"], True), (["no", "yes"], True)],
)
def test_names_that_say_nothing_leave_the_order(
    tmp_path: Path, backbone: list[str], words: bool
) -> None:
    path = class_label_file(tmp_path, ["negative", "positive"], [1, 0])
    assert data.read_rows(path, backbone, words=words).labels == [1, 0]


def test_other_classes_are_refused_with_both_orders(tmp_path: Path) -> None:
    path = class_label_file(tmp_path, ["joy", "anger", "fear"], [0, 1, 2])
    both = "its classes are joy, anger, fear in this order, the backbone's contradiction, neutral,"
    with pytest.raises(ValueError, match=both):
        data.read_rows(path, MNLI)
    with pytest.raises(ValueError, match="its classes are joy"):
        data.read_rows(path, ["LABEL_0", "LABEL_1"])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("1 0 1", [1, 0, 1]),
        ("1.0 0.0 -1", [1, 0, UNLABELLED]),
        ("-1 -1.0 nan", [UNLABELLED] * 3),
        ("0 NOTHING 1", [0, UNLABELLED, 1]),
        ("True false TRUE", [1, 0, 1]),
        ("Positive NEGATIVE -1", [1, 0, UNLABELLED]),
    ],
)
def test_labels_as_people_write_them(tmp_path: Path, labels: str, expected: list[int]) -> None:
    written = [label.replace("NOTHING", "") for label in labels.split()]
    rows = "".join(f"{label}\tsome text\n" for label in written)
    assert data.read_rows(write(tmp_path, "label\ttext\n" + rows), NAMES).labels == expected


def test_labels_of_a_data_frame(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a", "label": label}) for label in (True, False, None)]
    path = write(tmp_path, "\n".join(lines), ".jsonl")
    assert data.read_rows(path, NAMES).labels == [1, 0, UNLABELLED]
    with pytest.raises(ValueError, match="row 3: label None, which is none; drop the row"):
        data.read_rows(path, NAMES, need_labels=True)
    with pytest.raises(ValueError, match="row 1: label True: expected an integer from 0 to 2"):
        data.read_rows(path, MNLI)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        data.read_rows(tmp_path / "nothing.tsv", NAMES)
    path = write(tmp_path, "label\ttext\n1\tfine\n")
    with pytest.raises(ValueError, match=r"expected the columns a and b; .*with text_columns"):
        data.read_rows(path, NAMES, text_columns=["a", "b"])


def test_copies_are_unlabelled_and_keep_the_first_text_of_a_pair() -> None:
    pairs = data.LabelledText([("p", "one two three"), ("q", "four five six")], [0, 1])
    copies = data.spliced_copies(pairs, 2.0, seed=0)
    assert copies.labels == [UNLABELLED] * 4
    assert [text[0] for text in copies.texts] == ["p", "q", "p", "q"]
    words = set(["one", "two", "three", "four", "five", "six"])
    assert all(set(text[1].split()) <= words for text in copies.texts)
    assert copies == data.spliced_copies(pairs, 2.0, seed=0)


def test_rows_are_held_out_once() -> None:
    kept, held = data.split_rows(1000, 0.1, seed=0)
    assert sorted(kept + held) == list(range(1000))
    assert len(held) == 100
    assert len(data.split_rows(1000, 0.01, seed=0)[1]) == 64
    assert data.split_rows(1000, 0, seed=0)[1] == []
