"""Parquet files, with pyarrow and without."""

import sys

import pytest

from qmoe_jax.data import TextError, read_documents


@pytest.fixture
def write(tmp_path):
    """Write columns to a Parquet file, and return its path."""
    pyarrow = pytest.importorskip("pyarrow", reason="optional: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(columns: dict):
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
        return path

    return write


def test_the_column_text_holds_the_documents(write):
    path = write({"id": [1, 2, 3], "text": ["one", "zwei ä\0", "three"], "split": ["a", "b", "a"]})
    assert list(read_documents(path)) == ["one", "zwei ä\0", "three"]
    assert list(read_documents(path, "a")) == ["one", "three"]


def test_a_dictionary_of_strings_is_read(write):
    import pyarrow

    assert list(read_documents(write({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()}))) == [
        "a",
        "b",
        "a",
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "has no column of text(.|\n)*found: columns body"),
        ({"text": [1, 2]}, "has a text that is not a string(.|\n)*int64"),
        ({"text": ["a", None]}, "has a text that is not a string(.|\n)*null"),
    ],
)
def test_columns_without_text_are_named(write, columns, message):
    with pytest.raises(TextError, match=message):
        list(read_documents(write(columns)))


def test_damage_is_named(write):
    path = write({"text": ["one"] * 100})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TextError, match=r"a\.parquet: is damaged"):
        list(read_documents(path))


def test_without_pyarrow_the_file_is_refused_by_naming_what_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(TextError, match=r"a\.parquet: (.|\n)*\.jsonl or \.txt(.|\n)*pip install"):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_stream_of_parquet_is_named(tmp_path):
    (tmp_path / "stream").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(TextError, match=r"is a Parquet file(.|\n)*ends in \.parquet"):
        list(read_documents(tmp_path / "stream"))
