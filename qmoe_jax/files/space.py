"""Room on a disk, taken or tried before work is put into what needs it.

A full disk under a mapped file ends the process (a bus error), and one under another library's writers is
told in that library's words, so the room is allocated first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qmoe_jax.files.errors import system_error

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_PIECE = 1 << 30
"""Bytes of a file that only tries for room: below the largest file of any file system (4 GiB on FAT)."""

_TRIED = 1 << 34
"""Bytes that are allocated at most to try for room (16 GiB): slow where zeros have to be written."""

_ZEROS = bytes(1 << 20)


def allocate(descriptor: int, size: int) -> None:
    """Give an empty file `size` bytes of zeros that the disk has room for.

    Where the file system cannot allocate, the zeros are written.

    Raises:
        OSError: the disk is full, or the file would be larger than allowed.
    """
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        position = 0
        while position < size:
            position += os.pwrite(descriptor, memoryview(_ZEROS)[: size - position], position)


def require_room(directory: Path, size: int, *, wanted: object) -> None:
    """Check that `size` bytes can be written below a directory.

    The file system is asked, and the first `_TRIED` bytes are allocated and freed: quotas and limits count
    too, which the free space of a file system does not show.

    Args:
        directory: the directory; it may be missing.
        size: in bytes.
        wanted: the path or name of what will be written, for the error.

    Raises:
        CheckpointError: the disk or the quota is full.
    """
    nearest = next(place for place in (directory, *directory.absolute().parents) if place.is_dir())
    free = _free(nearest)
    try:
        if free is not None and free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _files(nearest) as files:
            for piece in _pieces(min(size, _TRIED)):
                allocate(next(files), piece)
    except OSError as error:
        known = "" if free is None else f" ({free:,} are)"
        expected = f"{size:,} bytes free{known}"
        raise system_error("cannot be written: not enough room", wanted, error, expected=expected) from error


def _pieces(size: int) -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = _PIECE if limit == resource.RLIM_INFINITY else max(1, min(_PIECE, limit))
    while size > 0:
        yield min(size, largest)
        size -= largest


@contextlib.contextmanager
def _files(directory: Path) -> Iterator[Iterator[int]]:
    """Yield descriptors of files without names, which end with the context."""
    with contextlib.ExitStack() as stack:
        yield (stack.enter_context(tempfile.TemporaryFile(dir=directory)).fileno() for _ in iter(int, 1))


def _free(directory: Path) -> int | None:
    """Return the free bytes of a file system; None where it does not tell."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize if found.f_blocks else None
