"""Documents from text files: the last suffix decides; marks, blank lines and line ends; odd texts."""

import json

import pytest

from qmoe_jax.data import TextError, read_documents
from qmoe_jax.data import text as text_module

TEXTS = ["one", "zwei ä\u2028\u0085\ttab", "drei"]
LINES = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in TEXTS]


def documents(path, content: bytes, split: str | None = None) -> list[str]:
    path.write_bytes(content)
    return list(read_documents(path, split))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.ndjson", "a.txt.jsonl", "a.b c.JSONL", "a.csv.json", "corpus"]
)
def test_json_lines_give_one_document_each(tmp_path, name):
    assert documents(tmp_path / name, b"\n".join(LINES)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.txt", "A.TXT", "corpus"])
def test_a_plain_text_is_one_document(tmp_path, name):
    assert documents(tmp_path / name, b"first\n\n second\n") == ["first\n\n second\n"]


@pytest.mark.parametrize("name", ["a.json.bak", "a.text", "a.csv", "a.tar.gz", "a.jsonl.gz.1"])
def test_a_suffix_that_is_not_read_is_refused_by_naming_those_that_are(tmp_path, name):
    with pytest.raises(TextError, match=r"(?s)does not tell how to read.*\.jsonl.*\.gz.*rename"):
        documents(tmp_path / name, LINES[0])


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES) + b"\n",
        b"\r\n".join(LINES),
        b"\r".join(LINES),
        b"\xef\xbb\xbf" + b"\n".join(LINES),
        b"\n".join(b"\xef\xbb\xbf" + line for line in LINES),
        b"\n\n" + b"\n \t \n\r\n".join(LINES) + b"\n\xe3\x80\x80\n   \n",
        b"\n".join(b"  " + line + b"  " for line in LINES),
    ],
    ids=["lf", "crlf", "cr", "mark", "mark on each line", "blank lines", "indented"],
)
def test_marks_blank_lines_and_line_ends_change_nothing(tmp_path, content):
    assert documents(tmp_path / "a.jsonl", content) == TEXTS


def test_a_plain_text_loses_its_mark_and_keeps_its_blank_lines(tmp_path):
    assert documents(tmp_path / "a.txt", b"\xef\xbb\xbf\r\none\r\n\rtwo") == ["\none\n\ntwo"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"null", "found: null"),
        (b"7", "found: a number, 7"),
        (b"true", "found: a boolean, true"),
        (b"[1, 2]", "found: an array"),
        (b'{"text": "a"}', "found: an object"),
        (b'"a \\ud83d"', r"lone surrogate \\ud83d at character 3"),
    ],
)
def test_a_text_that_is_not_a_string_of_unicode_is_named(tmp_path, value, found):
    with pytest.raises(TextError, match=rf"a\.jsonl, line 4: (?s:.)*expected: (?s:.)*{found}"):
        documents(tmp_path / "a.jsonl", b"\n".join([*LINES, b'{"text": %s}' % value]))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"body": "a", "id": 1}', "has no text(.|\n)*expected: a JSON object with(.|\n)*'body', 'id'"),
        (b'{"text": "a"', "is not JSON(.|\n)*Expecting"),
        (b"not JSON", "is not JSON(.|\n)*'not JSON'"),
        (b'[{"text": "a"}]', "is not a JSON object(.|\n)*found: an array\n(.|\n)*jq"),
        (b"[", "is not JSON(.|\n)*jq"),
        (b'"a"', "is not a JSON object(.|\n)*found: a string"),
        (b'{"text": "a", "text": "b"}', 'has more than one text(.|\n)*expected: one "text"(.|\n)*found: 2'),
        (b'{"text": "a", "n": %s}' % (b"[" * 100_000), "is not JSON(.|\n)*nested too deeply"),
        (b'{"text": "a", "n": %s}' % (b"1" * 5000), "is not JSON(.|\n)*digits"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 text(.|\n)*byte 0xe9 as byte 14(.|\n)*iconv"),
        (b'{"text": "a\x00"}', "holds NUL bytes"),
    ],
)
def test_a_line_that_is_not_a_document_is_named(tmp_path, line, found):
    with pytest.raises(TextError, match=rf"a\.jsonl, line 5: {found}"):
        documents(tmp_path / "a.jsonl", b"\n\n".join([*LINES[:2], line]))


@pytest.mark.parametrize("row", [b'{"text": "a", "n": {"text": "b"}}', b'{"text": "say \\"text\\""}'])
def test_the_word_text_elsewhere_in_a_row_is_not_a_second_text(tmp_path, row):
    assert documents(tmp_path / "a.jsonl", row) == [json.loads(row)["text"]]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_other_encodings_of_unicode_are_named(tmp_path, encoding, suffix):
    name = encoding[:6].upper()
    with pytest.raises(TextError, match=rf"is {name} text(.|\n)*iconv -f {name}"):
        documents(tmp_path / f"a{suffix}", "\ufeffone\n".encode(encoding))


def test_lines_of_another_split_are_not_looked_at(tmp_path):
    rows = b'{"text": null, "split": "a"}\n{"text": "two", "split": "b"}\n'
    assert documents(tmp_path / "a.jsonl", rows, "b") == ["two"]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a"])
def test_a_file_without_text_is_named(tmp_path, name, content):
    with pytest.raises(TextError, match=rf"{tmp_path / name}: holds no text"):
        documents(tmp_path / name, content)


@pytest.mark.parametrize(("name", "line"), [("a.jsonl", 2), ("a.txt", 3)])
def test_no_more_than_the_limit_is_held_in_memory(tmp_path, monkeypatch, name, line):
    monkeypatch.setattr(text_module, "MAX_BYTES", 20)
    with pytest.raises(TextError, match=f"{name}, line {line}: .* is too long(.|\n)*at most 20 bytes"):
        documents(
            tmp_path / name, b'{"text": 1}\n'.replace(b"1", b'"a"') + b"\n" * (name == "a.txt") + b"x" * 30
        )


def test_a_pointer_is_named(tmp_path):
    with pytest.raises(TextError, match=r"git-lfs pointer(.|\n)*git lfs pull"):
        documents(tmp_path / "a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
