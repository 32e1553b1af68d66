"""Files that are either whole or absent, even after a power cut, and the records they are checked against.

Memory: one chunk of what is written or checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qmoe_jax.files.errors import system_error
from qmoe_jax.files.reading import unreadable

HASH_CHUNK = 1 << 22
"""Bytes read at a time when a file is checked (4 MiB): enough to stream from a disk, little in memory."""

# A file system that cannot sync a directory (network and FUSE file systems) says so; a failing disk says EIO.
# EACCES: a directory may be written and entered, but not opened to be read.
_CANNOT_SYNC = (
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """The size of a file, in bytes, and the SHA-256 of its content."""

    bytes: int
    sha256: str


@contextlib.contextmanager
def durable_file(path: Path, *, host: int = 0) -> Iterator[BinaryIO]:
    """Open a file to write that takes its place only when the context ends without an error.

    It is written beside its place, synced and renamed, and the folder (made if it is missing) is synced. Its
    name meanwhile is the host's own, see `temporary_files`: several hosts may write into one folder.

    Raises:
        CheckpointError: the system refuses, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{host}.tmp")
    try:
        make_folder(path.parent)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # a full disk needs the room
        raise system_error("cannot be written", path, error) from error


def write_durably(path: Path, chunks: Iterable[bytes | memoryview], *, host: int = 0) -> FileRecord:
    """Write a file as `durable_file` does, and return its record. Raises as `durable_file` does."""
    sha, size = hashlib.sha256(), 0
    with durable_file(path, host=host) as file:
        for chunk in chunks:
            sha.update(chunk)
            size += file.write(chunk)
    return FileRecord(size, sha.hexdigest())


def write_json(path: Path, value: object) -> None:
    """Write JSON for people to read, as `durable_file` does: indented, keys sorted."""
    write_durably(path, [(json.dumps(value, indent=2, sort_keys=True) + "\n").encode()])


def record_of_pieces(pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Return the record of a file with these bytes."""
    sha, size = hashlib.sha256(), 0
    for piece in pieces:
        sha.update(piece)
        size += len(piece)
    return FileRecord(size, sha.hexdigest())


def record_of(path: Path) -> FileRecord:
    """Return the record of a file on disk, read chunk by chunk.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    sha, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(HASH_CHUNK):
                sha.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise unreadable(path, error) from error
    return FileRecord(size, sha.hexdigest())


def temporary_files(root: Path, host: int = 0) -> list[Path]:
    """Return the files that a killed run of this host left half-written below `root`."""
    return sorted(root.rglob(f".*.{host}.tmp"))


def make_folder(path: Path) -> None:
    """Make a folder that outlives a power cut, and those above it.

    Raises:
        CheckpointError: the system refuses.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise system_error("cannot be made", path, error) from error
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where its file system can.

    Raises:
        CheckpointError: the system refuses for another reason, for example a failing disk.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise system_error("cannot be synced to the disk", path, error) from error
