"""The objects below a URL as a store of files, through tensorstore's key-value drivers.

Nobody can be kept out of an object store, so nothing is overwritten unseen: an object is created only where
there is none, and replaced only where it still is the one that was read. Google's server and the file driver
do that in one step. For s3 tensorstore looks and then writes, between which another writer may come; so after
every write the object is looked at again, and bytes of somebody else are an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorstore as ts

from qmoe_jax.files.durable import FileRecord, record_of_pieces
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location, driver_error
from qmoe_jax.files.reading import truncated

_OUT_OF_RANGE = "OUT_OF_RANGE"
_SHORT = 1 << 20
"""Bytes of an object (1 MiB) that are rather read than asked for one by one."""

_PIECE = 1 << 26
"""Bytes of an object that are read at a time (64 MiB): most expert groups at once."""

_LONGEST = 5 << 30
"""Bytes of the longest object that one request can write (5 GiB, Amazon's limit)."""


class ObjectStore:
    """The objects below a URL. See `store.Store`."""

    exclusive = False

    def __init__(self, location: Location):
        assert isinstance(location.path, str)
        self.root: str = location.path
        self.context: ts.Context = location.context
        self.spec: dict[str, Any] = {"path": "", **location.spec}
        self.can_list: bool = self.spec["driver"] != "http"
        self._objects = location.store

    def path(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.root}/{name}"

    def entries(self) -> list[str]:
        """Return the first parts of all names."""
        return sorted({name.split("/")[0] for name in self.names()})

    def names(self, folder: str = "") -> list[str]:
        """Return all objects, or those below a folder; without the empty ones that stand for folders."""
        with self._refusing("cannot be listed"):
            keys = self._objects.list(_below(folder)).result()
        return sorted(name for key in keys if (name := key.decode(errors="replace")) and name[-1] != "/")

    def exists(self, name: str) -> bool:
        """Return whether an object is there."""
        return self._generation(name) is not None

    def size(self, name: str, expected: int | None = None) -> int | None:
        """Return the size of an object; None where there is none.

        Drivers do not tell sizes, only whether a byte is there: two requests confirm the expected size; a
        short object is read, and up to forty requests find the size of another.
        """
        if expected is not None and self._has_size(name, expected):
            return expected
        if not self.exists(name):
            return None
        if not self._has_byte(name, _SHORT):
            return len(self.read(name))
        least, beyond = _SHORT, 2 * _SHORT
        while self._has_byte(name, beyond - 1):
            least, beyond = beyond, 2 * beyond
        while least + 1 < beyond:  # bytes below `least` are there, the one before `beyond` is not
            middle = (least + beyond) // 2
            least, beyond = (middle, beyond) if self._has_byte(name, middle - 1) else (least, middle)
        return least

    def read(self, name: str) -> bytes:
        """Return a whole object."""
        if (found := self._content(name)) is None:
            raise self._missing(name)
        return found[0]

    def read_into(
        self,
        name: str,
        offset: int,
        pieces: Sequence[memoryview],
        *,
        file_size: int | None = None,
        key: str | None = None,
    ) -> None:
        """Fill pieces of memory with a range of an object, in one request."""
        end = offset + sum(map(len, pieces))
        try:
            with self._refusing("cannot be read", name, key):
                found = self._objects.read(name, byte_range=slice(offset, end)).result()
        except CheckpointError as error:
            if _OUT_OF_RANGE not in str(error.found):
                raise
            raise truncated(self.path(name), expected=end, found=self.size(name) or 0, key=key) from error
        if found.state != "value":
            raise self._missing(name, key)
        data, position = memoryview(found.value), 0
        if len(data) != end - offset:
            raise truncated(self.path(name), expected=end, found=offset + len(data), key=key)
        for piece in pieces:
            piece[:] = data[position : position + len(piece)]
            position += len(piece)

    def find_record(self, name: str) -> FileRecord | None:
        """Return the record of an object, all of whose bytes are read; None where there is none.

        Memory: `_PIECE` bytes.
        """
        sha, size, generation = hashlib.sha256(), 0, None
        more = True
        while more:
            more = self._has_byte(name, size + _PIECE)
            with self._refusing("cannot be read", name):
                part = slice(size, size + _PIECE if more else None)
                found = self._objects.read(name, byte_range=part).result()
            if found.state != "value":
                return None
            if generation not in (None, found.stamp.generation):
                raise CheckpointError(
                    "was replaced while it was read",
                    path=self.path(name),
                    remedy="run the same command again",
                )
            generation = found.stamp.generation
            sha.update(found.value)
            size += len(found.value)
        return FileRecord(size, sha.hexdigest())

    def write(
        self,
        name: str,
        chunks: Iterable[bytes | memoryview],
        *,
        over: FileRecord | None = None,
        host: int = 0,
    ) -> FileRecord:
        """Create an object, or replace the one whose record is `over`."""
        content = b"".join(chunks)
        record, expected = record_of_pieces([content]), _absent()
        if record.bytes > _LONGEST:
            raise CheckpointError(
                "is too long for one object", path=self.path(name), expected=f"at most {_LONGEST:,} bytes",
                found=f"{record.bytes:,}", remedy="write to a local directory, and copy it there",
            )  # fmt: skip
        if over is not None and (present := self._content(name)) is not None:
            self._require(name, record_of_pieces([present[0]]), (over, record))
            expected = present[1]
        with self._refusing("cannot be written", name):
            stamp = self._objects.write(name, content, if_equal=expected).result()
        # No generation: something else lay there, or the answer of an earlier try was lost.
        if not stamp.generation or self._generation(name) != stamp.generation:
            if (found := self.find_record(name)) is None:  # so s3 answers where there is no bucket
                raise CheckpointError(
                    "cannot be written", path=self.path(name), found="no object after it was written",
                    remedy="check that the bucket exists, and that nobody removes objects there",
                )  # fmt: skip
            self._require(name, found, (record,))
        return record

    def delete(self, name: str) -> None:
        """Remove an object."""
        with self._refusing("cannot be removed", name):
            self._objects.write(name, None).result()

    def delete_folder(self, folder: str) -> None:
        """Remove all objects below a folder."""
        with self._refusing("cannot be removed", folder):
            self._objects.delete_range(_below(folder)).result()

    def lock(self, name: str) -> Callable[[], None]:
        """Do nothing: writers meet in `write`."""
        return lambda: None

    def remove_temporary(self, host: int) -> None:
        """Do nothing: an object is whole or absent."""

    def _content(self, name: str) -> tuple[bytes, bytes] | None:
        """Return the bytes of an object and its generation; None where there is none."""
        with self._refusing("cannot be read", name):
            found = self._objects.read(name).result()
        return (found.value, found.stamp.generation) if found.state == "value" else None

    def _generation(self, name: str) -> bytes | None:
        """Return the generation of an object, whose bytes are not read; None where there is none."""
        with self._refusing("cannot be read", name):
            found = self._objects.read(name, byte_range=slice(0, 0)).result()
        return found.stamp.generation if found.state == "value" else None

    def _has_size(self, name: str, size: int) -> bool:
        last = self._objects.read(name, byte_range=slice(max(0, size - 1), size))  # with the next, at once
        return not self._has_byte(name, size) and self._holds_range(name, last)

    def _has_byte(self, name: str, place: int) -> bool:
        return self._holds_range(name, self._objects.read(name, byte_range=slice(place, place + 1)))

    def _holds_range(self, name: str, reading: ts.Future[Any]) -> bool:
        try:
            with self._refusing("cannot be read", name):
                return reading.result().state == "value"
        except CheckpointError as error:
            if _OUT_OF_RANGE not in str(error.found):
                raise
            return False

    def _require(self, name: str, found: FileRecord, expected: tuple[FileRecord, ...]) -> None:
        """Raise `CheckpointError` where an object is none of those expected."""
        if found not in expected:
            raise CheckpointError(
                "is written by another process too, with other bytes",
                path=self.path(name),
                expected=expected[0],
                found=found,
                remedy="stop the other process, or choose another location; if none runs, remove the object, "
                "then run the same command again",
            )

    def _missing(self, name: str, key: str | None = None) -> CheckpointError:
        return CheckpointError(
            "cannot be read", path=self.path(name), key=key, found="no such object",
            remedy="copy the file again",
        )  # fmt: skip

    @contextlib.contextmanager
    def _refusing(self, problem: str, name: str = "", key: str | None = None) -> Iterator[None]:
        """Turn the driver's errors into `CheckpointError`."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
            raise driver_error(problem, self.path(name) if name else self.root, error, key=key) from error


def _below(folder: str) -> ts.KvStore.KeyRange:
    """Return the keys below a folder; all of them for ""."""
    after = chr(ord("/") + 1)
    return ts.KvStore.KeyRange(f"{folder}/", f"{folder}{after}") if folder else ts.KvStore.KeyRange()


@functools.cache
def _absent() -> bytes:
    """Return the generation that stands for no object, whatever the driver."""
    empty = ts.KvStore.open({"driver": "memory"}).result()
    return empty.read("anything").result().stamp.generation
