"""Reading bytes of local files exactly: all that were asked for, or an error that names the file.

Files are read by `pread`, never mapped: a file that is cut short while it is read raises an error instead of
ending the process with a bus error. Memory: what is asked for, allocated once and filled in place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.files.errors import CheckpointError, system_error
from qmoe_jax.files.foreign import foreign_error

_MAX_PIECES = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one system call fills at most (1024 on Linux)."""


def read_into(
    path: Path,
    offset: int,
    pieces: Sequence[memoryview],
    *,
    file_size: int | None = None,
    key: str | None = None,
) -> None:
    """Fill pieces of memory, one after another, with the bytes of a file from `offset` on.

    The GIL is released while the system reads.

    Args:
        path: the file.
        offset: of the first byte.
        pieces: writable bytes.
        file_size: size in bytes that the file must have; None: any that holds the range.
        key: what is read, for the error.

    Raises:
        CheckpointError: the file is missing, cannot be read, ends within the range, or has another size.
    """
    position, left = offset, [piece for piece in pieces if len(piece)]
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if file_size is not None and (found := os.fstat(descriptor).st_size) != file_size:
                raise wrong_size(path, expected=file_size, found=found)
            while left:
                count = os.preadv(descriptor, left[:_MAX_PIECES], position)
                if count == 0:
                    raise truncated(path, expected=offset + sum(map(len, pieces)), found=position, key=key)
                position += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error, key=key) from error


def read_array(path: Path, offset: int, array: np.ndarray, key: str) -> np.ndarray:
    """Fill a contiguous array with the bytes from `offset` on, and return it. Raises as `read_into` does."""
    read_into(path, offset, [array.reshape(-1).view(np.uint8).data], key=key)
    return array


def read_whole(path: Path) -> bytes:
    """Return a whole small file. Raises `CheckpointError` if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `CheckpointError` if there is none."""
    data = read_whole(path)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise foreign_error(path, data) or CheckpointError(
            "is not valid JSON", path=path, found=error
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError("does not hold a JSON object", path=path, found=type(value).__name__)
    return value


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text. Raises `ValueError` where it is none, or nested beyond reason."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("objects and lists are nested too deeply") from error


def unreadable(path: Path, error: OSError, key: str | None = None) -> CheckpointError:
    """Return the error for a file that the system cannot read."""
    if isinstance(error, FileNotFoundError):
        found = error.strerror or str(error)
        return CheckpointError(
            "cannot be read", path=path, key=key, found=found, remedy="copy the file again"
        )
    return system_error("cannot be read", path, error, key=key)


def truncated(path: object, *, expected: int, found: int, key: str | None = None) -> CheckpointError:
    """Return the error for a file that ends too early; sizes in bytes."""
    return CheckpointError(
        "is cut short",
        path=path,
        key=key,
        expected=f"at least {expected} bytes",
        found=f"{found} bytes",
        remedy="copy the file again",
    )


def wrong_size(path: object, *, expected: int, found: int) -> CheckpointError:
    """Return the error for a file that must have exactly `expected` bytes."""
    if found < expected:
        return truncated(path, expected=expected, found=found)
    return CheckpointError(
        "is too long",
        path=path,
        expected=f"{expected} bytes",
        found=f"{found} bytes",
        remedy="copy the file again",
    )
