"""Documents from text files."""

import gzip
import json
import lzma

import pytest

from qmoe_jax.data import TextError, read_documents


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_json_lines_give_one_document_each(tmp_path, suffix, opener):
    path = tmp_path / f"texts.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": text, "split": s}) + "\n" for text, s in [("one", "a"), ("two", "b")]
        )
    assert list(read_documents(path)) == ["one", "two"]
    assert list(read_documents(tmp_path, split="b")) == ["two"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond")
    assert list(read_documents(tmp_path)) == ["first\n\nsecond"]


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(TextError, match=f"{tmp_path}: no text found"):
        list(read_documents(tmp_path))


def test_a_line_that_is_not_a_document_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "not"}\n')
    with pytest.raises(TextError, match=r"bad\.jsonl, line 2"):
        list(read_documents(path))


def test_a_damaged_text_archive_is_named(tmp_path):
    path = tmp_path / "bad.jsonl.xz"
    path.write_bytes(b"not an archive")
    with pytest.raises(TextError, match=r"bad\.jsonl\.xz: is damaged"):
        list(read_documents(path))
