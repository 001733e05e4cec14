"""Every mistake in a file is named with its row before training starts."""

from pathlib import Path

import pytest

from revmux_vllm.training.data import read_tsv


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "rows.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_single_texts_and_pairs(tmp_path: Path) -> None:
    single = read_tsv(write(tmp_path, 'label\ttext\n1\tfine\n0\t"odd" quote\n'), 2)
    assert (single.texts, single.labels) == (["fine", '"odd" quote'], [1, 0])
    pair = read_tsv(write(tmp_path, "label\ttext_a\ttext_b\n1\ta\tb\n0\tc\td\n"), 2)
    assert pair.texts == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\nfine\n", r"row 1: expected the columns .* found \['text'\]"),
        ("", "row 1: expected the columns"),
        ("label\ttext\n1\tfine\tmore\n", "row 2: expected 2 fields, found 3"),
        ("label\ttext\n1\tfine\n2\tfine\n", "row 3: label '2': expected an integer from 0 to 1"),
        ("label\ttext\npositive\tfine\n", "row 2: label 'positive'"),
        ("label\ttext\n1\t \n", "row 2: empty text"),
        ("label\ttext\n1\tfine\n1\tgood\n", "at least two classes"),
        (b"label\ttext\n1\t\xff\xfe\n", "not UTF-8 at byte 13"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tsv(write(tmp_path, content), 2)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_tsv(tmp_path / "nothing.tsv", 2)
