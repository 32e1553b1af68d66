"""Stores of files: one contract, a local directory and three of tensorstore's drivers."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from qmoe_jax.files.durable import FileRecord, record_of_pieces
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.local_store import LocalStore
from qmoe_jax.files.object_store import ObjectStore
from qmoe_jax.files.output import output_store
from qmoe_jax.files.store import File, Store, make_hold, open_store
from tests.helpers.stores import file_driver_store, memory_store

CONTENT = bytes(range(250)) * 20
STORES = ("local", "memory", "file", "s3")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    makers: dict[str, Callable[[], Store]] = {
        "local": lambda: LocalStore(tmp_path),
        "memory": memory_store,
        "file": lambda: file_driver_store(tmp_path),
    }
    return makers[request.param]()


def test_a_file_is_read_as_it_was_written(store: Store) -> None:
    record = store.write("a/b", [CONTENT[:100], CONTENT[100:]])
    assert record == store.find_record("a/b") == record_of_pieces([CONTENT])
    assert store.read("a/b") == CONTENT
    assert File(store, "a/b").read_exactly(7, 20) == CONTENT[7:27]
    assert File(store, "a/b").read_array(8, np.zeros(3, "<u4"), "key").tobytes() == CONTENT[8:20]


def test_one_read_fills_pieces_in_order(store: Store) -> None:
    store.write("file", [CONTENT])
    pieces = [bytearray(size) for size in (3, 0, 5)]
    store.read_into("file", 10, [memoryview(piece) for piece in pieces])
    assert b"".join(pieces) == CONTENT[10:18]


@pytest.mark.parametrize("expected", [None, 0, 4999, 5000, 5001, 70_000])
def test_the_size_of_a_file_is_found_whatever_was_expected(store: Store, expected: int | None) -> None:
    store.write("file", [CONTENT])
    store.write("empty", [])
    assert store.size("file", expected) == 5000
    assert store.size("empty", expected) == 0
    assert store.size("missing", expected) is None


def test_names_are_listed_whole_by_folder_and_by_their_first_part(store: Store) -> None:
    assert store.names() == store.entries() == []
    for name in ("b/c/d", "b/a", "bc/e", "a", ".hidden"):
        store.write(name, [b"bytes"])
    assert store.names() == [".hidden", "a", "b/a", "b/c/d", "bc/e"]
    assert store.names("b") == ["b/a", "b/c/d"]
    assert store.entries() == [".hidden", "a", "b", "bc"]
    store.delete_folder("b")
    store.delete("a")
    store.delete("a")
    assert store.names() == [".hidden", "bc/e"]
    assert store.exists("bc/e")
    assert not store.exists("a")


def test_a_missing_file_is_an_error_that_names_it(store: Store) -> None:
    assert store.find_record("a/missing") is None
    for read in (lambda: store.read("a/missing"), lambda: File(store, "a/missing").read_exactly(0, 3)):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read()
        assert caught.value.path == str(store.path("a/missing"))


@pytest.mark.parametrize("offset", [4990, 5000, 9000])
def test_a_range_beyond_the_end_is_an_error_with_both_sizes(store: Store, offset: int) -> None:
    store.write("file", [CONTENT])
    with pytest.raises(CheckpointError, match="is cut short") as caught:
        File(store, "file").read_exactly(offset, 20)
    assert (caught.value.path, caught.value.expected) == (
        str(store.path("file")),
        f"at least {offset + 20} bytes",
    )


def test_a_file_that_holds_the_bytes_already_stays_and_another_is_replaced(store: Store) -> None:
    for content in (b"one", b"one", b"another"):
        assert make_hold(store, "file", [content]) == record_of_pieces([content])
        assert store.read("file") == content


@pytest.fixture(params=[name for name in STORES if name != "local"])
def shared(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    """A store in which others may write."""
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    return memory_store() if request.param == "memory" else file_driver_store(tmp_path)


def test_an_object_of_somebody_else_is_never_replaced_unseen(shared: Store) -> None:
    theirs = shared.write("file", [b"theirs"])
    for over in (None, FileRecord(3, "f" * 64)):
        with pytest.raises(CheckpointError, match="another process") as caught:
            shared.write("file", [b"ours"], over=over)
        assert caught.value.path == shared.path("file")
        assert str(theirs) in str(caught.value.found)
    assert shared.read("file") == b"theirs"


def test_an_object_with_the_same_bytes_may_come_from_anybody(shared: Store) -> None:
    record = shared.write("file", [b"bytes"])
    assert shared.write("file", [b"bytes"]) == record


def test_a_write_that_another_overtakes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = memory_store()

    class Overtaken:
        """Writes, and is overwritten before it looks."""

        def __init__(self, objects: object):
            self.objects = objects

        def write(self, name: str, value: bytes, **options: object) -> object:
            result = self.objects.write(name, value, **options)
            self.objects.write(name, b"theirs").result()
            return result

        def __getattr__(self, name: str) -> object:
            return getattr(self.objects, name)

    monkeypatch.setattr(store, "_objects", Overtaken(store._objects))
    with pytest.raises(CheckpointError, match="another process"):
        store.write("file", [b"ours"])


def test_records_of_long_objects_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmoe_jax.files.object_store._PIECE", 100)
    store = memory_store()
    for size in (0, 99, 100, 101, 200, 250):
        assert store.write(f"{size}", [CONTENT[:size]]) == store.find_record(f"{size}")


def test_a_url_is_tried_before_anything_is_written_there(s3_url: str) -> None:
    store = output_store(s3_url, inputs=("s3://elsewhere",))
    assert isinstance(store, ObjectStore)
    assert store.names() == []
    with pytest.raises(CheckpointError, match="lies within the input"):
        output_store(f"{s3_url}/below", inputs=(s3_url,))


def test_a_url_that_cannot_be_written_is_refused_with_a_remedy(s3: str) -> None:
    for url, problem, remedy in (
        ("s3://no-such-bucket/model", "cannot be listed", "make the bucket"),
        ("http://127.0.0.1:9/model", "cannot be written", "gs:// or s3://"),
        ("ftp://host/model", "no driver opens ftp", "gs://"),
    ):
        with pytest.raises(CheckpointError, match=problem) as caught:
            output_store(url)
        assert remedy in str(caught.value)
