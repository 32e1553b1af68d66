"""Files that are either whole or absent, and reads that notice when one is not."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from qmoe_jax.files.errors import CheckpointError

HASH_CHUNK = 1 << 22
"""Bytes read at a time when a file is checked: large enough to stream, small beside any budget."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


def write_durably(path: Path, chunks: Iterable[bytes | memoryview], *, host: int = 0) -> FileRecord:
    """Writes a file beside its place, syncs and renames it, syncs the folder: it is whole or absent.

    The name it has meanwhile is the host's own (`temporary_files` finds it): hosts may write into one folder.

    Raises:
      CheckpointError: the system does not let it, such as where the disk is full.
    """
    temporary, sha, size = path.with_name(f".{path.name}.{host}.tmp"), hashlib.sha256(), 0
    try:
        make_folder(path.parent)
        with temporary.open("wb") as file:
            for chunk in chunks:
                sha.update(chunk)
                size += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError("cannot be written", path=path, found=error.strerror or str(error)) from error
    return FileRecord(size, sha.hexdigest())


def record_of_pieces(pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """What a file of these bytes must be."""
    sha, size = hashlib.sha256(), 0
    for piece in pieces:
        sha.update(piece)
        size += len(piece)
    return FileRecord(size, sha.hexdigest())


def temporary_files(root: Path, host: int = 0) -> list[Path]:
    """What a killed run of this host left half-written."""
    return sorted(root.rglob(f".*.{host}.tmp"))


def make_folder(path: Path) -> None:
    """Makes a folder that outlives a power cut, and those above it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_exactly(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, by `pread`: where the file is shorter, an error and not a bus error.

    Raises:
      CheckpointError: the file is missing, cannot be read, or ends before.
    """
    found = b""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while len(found) < size and (
                more := os.pread(descriptor, size - len(found), offset + len(found))
            ):
                found = found + more if found else more
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(found) < size:
        raise truncated(path, expected=offset + size, found=offset + len(found))
    return found


def read_whole(path: Path) -> bytes:
    """All of a small file. Raises `CheckpointError` where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def record_of(path: Path, on_bytes: Callable[[int], object] = lambda _: None) -> FileRecord:
    """Size and checksum of a file as it lies on the disk; `on_bytes` hears of every chunk read.

    Raises:
      CheckpointError: the file is missing or cannot be read.
    """
    sha, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(HASH_CHUNK):
                sha.update(chunk)
                size += len(chunk)
                on_bytes(len(chunk))
    except OSError as error:
        raise unreadable(path, error) from error
    return FileRecord(size, sha.hexdigest())


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not give."""
    remedy = "copy the artifact again" if isinstance(error, FileNotFoundError) else None
    return CheckpointError("cannot be read", path=path, found=error.strerror or str(error), remedy=remedy)


def truncated(path: Path, *, expected: int, found: int) -> CheckpointError:
    """The error for a file that ends before it should."""
    return CheckpointError(
        "is cut short",
        path=path,
        expected=f"at least {expected} bytes",
        found=f"{found} bytes",
        remedy="copy the file again",
    )
