"""Stores of files: a local directory, or the objects below a URL, with one set of operations.

Names are relative, with "/" between folders. A file is whole or absent, whoever reads it and whatever
happens while it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorstore as ts

from qmoe_jax.files.durable import FileRecord, record_of_pieces
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.local_store import LocalStore
from qmoe_jax.files.location import Location
from qmoe_jax.files.object_store import ObjectStore


@runtime_checkable
class Store(Protocol):
    """A place with files; all methods raise `CheckpointError`, which names the file, where they cannot."""

    @property
    def root(self) -> Path | str:
        """A `Path` if it is local, else the URL."""
        ...

    @property
    def exclusive(self) -> bool:
        """True where `lock` keeps every other writer out. Elsewhere writers meet in `write`."""
        ...

    @property
    def can_list(self) -> bool:
        """False where nothing tells which files there are (http)."""
        ...

    @property
    def context(self) -> ts.Context | None:
        """The context to open arrays below it with; None for the default one."""
        ...

    @property
    def spec(self) -> dict[str, Any]:
        """The `kvstore` member of a tensorstore spec for this place; its path ends with a slash."""
        ...

    def path(self, name: str) -> Path | str:
        """Return where a file lies."""
        ...

    def entries(self) -> list[str]:
        """Return the names of the files and folders at the root, sorted; none where nothing is there."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files, or of those below a folder, sorted."""
        ...

    def exists(self, name: str) -> bool:
        """Return whether a file is there."""
        ...

    def size(self, name: str, expected: int | None = None) -> int | None:
        """Return the size of a file in bytes; None where there is none.

        Args:
            name: the file.
            expected: the size that it should have, which an object store confirms in two requests.
        """
        ...

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        ...

    def read_into(
        self,
        name: str,
        offset: int,
        pieces: Sequence[memoryview],
        *,
        file_size: int | None = None,
        key: str | None = None,
    ) -> None:
        """Fill pieces of memory, one after another, with the bytes of a file from `offset` on.

        Args:
            name: the file.
            offset: of the first byte.
            pieces: writable bytes.
            file_size: size in bytes that a local file must have; objects do not change while they are read.
            key: what is read, for the error.
        """
        ...

    def find_record(self, name: str) -> FileRecord | None:
        """Return the record of a file, all of whose bytes are read; None where there is none."""
        ...

    def write(
        self,
        name: str,
        chunks: Iterable[bytes | memoryview],
        *,
        over: FileRecord | None = None,
        host: int = 0,
    ) -> FileRecord:
        """Write a file, and return its record; it is durable then.

        Args:
            name: the file.
            chunks: its bytes. Memory: one chunk locally, all of them in an object store.
            over: record of the file that it replaces; None for a new one. In a store that is not `exclusive`
                anything else that lies there is an error, unless it has the same bytes.
            host: number of this host, if several write here.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def delete_folder(self, folder: str) -> None:
        """Remove all files below a folder."""
        ...

    def lock(self, name: str) -> Callable[[], None]:
        """Keep other writers out, by a file of this name, until the function that is returned is called."""
        ...

    def remove_temporary(self, host: int) -> None:
        """Remove what a killed writer left half-written."""
        ...


Place = str | os.PathLike[str] | Store
"""A path, a URL, or a store that was opened."""


def open_store(place: Place) -> Store:
    """Return the store at a path or URL; nothing is read. Raises `CheckpointError` as `Location.of` does."""
    if isinstance(place, Store):
        return place
    location = Location.of(place)
    return LocalStore(location.path) if isinstance(location.path, Path) else ObjectStore(location)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a store; it need not exist."""

    store: Store
    name: str

    @classmethod
    def at(cls, path: Path) -> File:
        """Return a local file."""
        return cls(LocalStore(path.parent), path.name)

    @property
    def path(self) -> Path | str:
        """The path or URL."""
        return self.store.path(self.name)

    def size(self, expected: int | None = None) -> int | None:
        """Return its size in bytes, as `Store.size` does."""
        return self.store.size(self.name, expected)

    def read_exactly(self, offset: int, size: int, key: str | None = None) -> memoryview:
        """Return `size` bytes from `offset` on, read-only. Raises as `Store.read_into` does."""
        data = np.empty(size, np.uint8)
        self.store.read_into(self.name, offset, [data.data], key=key)
        data.flags.writeable = False
        return data.data

    def read_array(self, offset: int, array: np.ndarray, key: str) -> np.ndarray:
        """Fill a contiguous array with the bytes from `offset` on, and return it."""
        self.store.read_into(self.name, offset, [array.reshape(-1).view(np.uint8).data], key=key)
        return array


def make_hold(store: Store, name: str, chunks: Sequence[bytes | memoryview], *, host: int = 0) -> FileRecord:
    """Make a file hold these bytes, and return its record; a file that does stays untouched.

    Anything else that lies there is replaced, unless another process changes it meanwhile.
    """
    record, found = record_of_pieces(chunks), readable_record(store, name)
    return record if found == record else store.write(name, chunks, over=found, host=host)


def readable_record(store: Store, name: str) -> FileRecord | None:
    """Return the record of a file; None where there is none, or none that can be read."""
    with contextlib.suppress(CheckpointError):
        return store.find_record(name)
    return None
