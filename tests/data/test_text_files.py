"""Text files: found in folders, hidden ones left out; standard input and pipes."""

import io
import os
import sys
import threading
import types

import pytest

from qmoe_jax.data import TextError, read_documents
from qmoe_jax.data.text_files import check_pipes, text_files


@pytest.fixture
def write(tmp_path):
    """Write a JSON line whose text is the file's path, and return the path."""

    def write(name: str):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n')
        return path

    return write


def names(folder) -> list[str]:
    return [file.path.relative_to(folder).as_posix() for file in text_files(folder)]


def test_a_folder_is_searched_at_any_depth_in_the_order_of_bytes(tmp_path, write):
    for name in ("b.jsonl", "a/z.txt", "a.json.gz", "Z/y/x.ndjson", "ä.jsonl", "a/README.md", "LICENSE"):
        write(name)
    assert names(tmp_path) == ["Z/y/x.ndjson", "a/z.txt", "a.json.gz", "b.jsonl", "ä.jsonl"]


HIDDEN = [
    ".a.jsonl",
    "._a.jsonl",
    ".ipynb_checkpoints/a.jsonl",
    "b/.git/c/a.txt",
    "__MACOSX/a.txt",
    "b~/a.txt",
]


@pytest.mark.parametrize("name", [*HIDDEN, "a.jsonl~", "b/._a.txt"])
def test_hidden_files_in_a_folder_are_left_out(tmp_path, write, name):
    write("a.jsonl")
    write(name)
    assert names(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("name", [".a.jsonl", ".cache/a.jsonl"])
def test_a_hidden_file_that_is_named_is_read(write, name):
    assert list(read_documents(write(name))) == [name]


def test_a_hidden_folder_that_is_named_is_read(tmp_path, write):
    write(".cache/b/a.jsonl")
    assert names(tmp_path / ".cache") == ["b/a.jsonl"]


def test_links_are_followed_and_each_file_is_read_once(tmp_path, write):
    write("elsewhere/a.jsonl")
    write("texts/b/c.jsonl")
    for link, target in {
        "texts/linked": "../elsewhere", "texts/again.jsonl": "b/c.jsonl", "texts/b/loop": "../b",
        "texts/up": "..", "texts/root": "/",
    }.items():  # fmt: skip
        (tmp_path / link).symlink_to(target)
    assert names(tmp_path / "texts") == ["again.jsonl", "linked/a.jsonl"]


@pytest.mark.parametrize("target", ["missing.jsonl", "a.jsonl"])
def test_a_broken_link_is_named(tmp_path, target):
    (tmp_path / "a.jsonl").symlink_to(target)
    with pytest.raises(TextError, match=r"a\.jsonl: is a broken link"):
        text_files(tmp_path)


def test_a_broken_link_that_is_not_text_is_left_out(tmp_path, write):
    write("a.jsonl")
    (tmp_path / "README.md").symlink_to("missing")
    assert names(tmp_path) == ["a.jsonl"]


def test_text_in_a_compression_that_is_not_read_is_named(tmp_path, write):
    write("a.jsonl")
    write("b.jsonl.lz4")
    with pytest.raises(TextError, match=r"b\.jsonl\.lz4: text compressed as \.lz4 is not read"):
        text_files(tmp_path)


@pytest.mark.parametrize(("present", "found"), [((), "no files"), (("a.csv", "b.md"), "a.csv, b.md")])
def test_a_folder_without_text_says_what_it_holds(tmp_path, write, present, found):
    for name in present:
        write(name)
    with pytest.raises(TextError, match=f"{tmp_path}: no text found(.|\n)*found: {found}"):
        text_files(tmp_path)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(TextError, match=r"missing: no text found there(.|\n)*found: No such file"):
        text_files(tmp_path / "missing")


@pytest.mark.parametrize("path", ["gs://bucket/a.jsonl", "https://host/a.jsonl"])
def test_a_url_is_refused_as_such(path):
    with pytest.raises(TextError, match=rf"{path}: is a URL(.|\n)*standard input"):
        text_files(path)


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(TextError, match="path of a text is empty"):
        text_files("")


def test_a_file_url_and_the_home_are_local_paths(tmp_path, write, monkeypatch):
    path = write("a b.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [file.path for name in (path.as_uri(), "~/a b.jsonl") for file in text_files(name)]
    assert found == [path, path]


@pytest.fixture
def pipe(tmp_path):
    """Return a function that makes a named pipe and writes to it."""
    threads = []

    def pipe(name: str, content: bytes):
        os.mkfifo(tmp_path / name)
        threads.append(threading.Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True))
        threads[-1].start()
        return tmp_path / name

    yield pipe
    for thread in threads:
        thread.join(10)


ROW = b'{"text": "one"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("pipe", ROW, "one"),
        ("pipe.jsonl", ROW, "one"),
        ("pipe.fifo", b"\n plain", " plain"),
        ("p.txt", ROW, ROW.decode()),
    ],
)
def test_a_pipe_is_read_by_its_name_or_else_by_its_text(pipe, name, content, expected):
    assert list(read_documents(pipe(name, content))) == [expected]


def test_a_pipe_is_read_once(pipe):
    path = pipe("pipe", ROW)
    assert list(read_documents(path)) == ["one"]
    with pytest.raises(TextError, match=r"is a pipe that is to be read twice(.|\n)*write its text to a file"):
        list(read_documents(path))


def test_one_pipe_for_two_purposes_is_refused_before_it_is_read(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    file, same = text_files(write("a.jsonl")), text_files(tmp_path / "pipe")
    check_pipes(file, file, same)
    with pytest.raises(TextError, match="is to be read twice"):
        check_pipes(same, file, same)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_is_read(monkeypatch, name):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"\n" + ROW)))
    assert list(read_documents(name)) == ["one"]


def test_closed_standard_input_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(TextError, match="standard input: is closed"):
        list(read_documents("-"))


def test_an_unnamed_pipe_is_decompressed():
    import gzip

    reading, writing = os.pipe()
    os.write(writing, gzip.compress(ROW * 3))
    os.close(writing)
    try:
        assert list(read_documents(f"/dev/fd/{reading}")) == ["one"] * 3
    finally:
        os.close(reading)
