"""Checks of where something is to be written, made before any work.

What can be known at the start is refused at the start: a place that cannot be written must not cost a day.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import uuid
from pathlib import Path

from qmoe_jax.files.errors import CheckpointError, system_error
from qmoe_jax.files.location import local_path
from qmoe_jax.files.names import is_stray
from qmoe_jax.files.store import Store, open_store

# A URL, of which a Path has already dropped the second slash, or `host:/path`.
_REMOTE = re.compile(r"[^/]+:/")
_PROBE = ".write-check"
"""Beginning of the name of an object that is written to try: hidden, so one that stays is nobody's."""

_LONGEST_NAME = 100
"""Bytes by which the longest path of what is written exceeds that of its directory, at most."""


def output_directory(path: str | os.PathLike[str], *, inputs: tuple[object, ...] = ()) -> Path:
    """Return the local directory to write into; it may exist, and may hold something.

    A file URL is decoded and `~` is the home, as in paths to read. Nothing is left behind by the check.

    Args:
        path: a local path or a file URL.
        inputs: directories and URLs that are read meanwhile: the output must not be one or lie within one.

    Raises:
        CheckpointError: it is a URL, a file or a link to nothing, lies within a file or an input, or the
            system does not let this process write there.
    """
    directory = _local(path)
    try:
        _require_directory(directory)
        for entry in inputs:
            _require_outside(directory, entry)
        _require_writable(directory)
    except OSError as error:
        raise system_error("cannot be written", directory, error) from error
    return directory


def output_store(path: str | os.PathLike[str], *, inputs: tuple[object, ...] = ()) -> Store:
    """Return the local directory that `output_directory` accepts, or the objects below a URL, to write into.

    At a URL an empty object is written and removed, since nothing else tells that this is allowed.

    Raises:
        CheckpointError: as `output_directory`; or the server, or the kind of URL, does not let this process
            write there.
    """
    if not _is_object_url(path):
        return open_store(output_directory(path, inputs=inputs))
    store = open_store(path)
    for entry in inputs:
        if isinstance(entry, str) and f"{store.root}/".startswith(f"{entry.rstrip('/')}/"):
            raise CheckpointError(
                "lies within the input", path=store.root, expected="a location outside of what is read",
                found=entry, remedy="choose another location",
            )  # fmt: skip
    if not store.can_list:
        raise CheckpointError(
            "cannot be written: URLs of this kind are only read", path=store.root,
            expected="a local directory, or gs:// or s3://", remedy="choose another location",
        )  # fmt: skip
    store.names(_PROBE)  # a missing bucket is told by its name
    probe = f"{_PROBE}-{uuid.uuid4().hex}"  # several hosts may try at once
    store.write(probe, [])
    store.delete(probe)
    return store


def _is_object_url(path: str | os.PathLike[str]) -> bool:
    return isinstance(path, str) and "\0" not in path and bool(path) and local_path(path) is None


def new_output_directory(path: str | os.PathLike[str], *, inputs: tuple[object, ...] = ()) -> Path:
    """Return the local directory to write into, as `output_directory` does, where it is missing or empty.

    Files that systems and file managers leave (`names.is_stray`) do not count.

    Raises:
        CheckpointError: as `output_directory`, or the directory holds something.
    """
    directory = output_directory(path, inputs=inputs)
    require_empty(directory)
    return directory


def output_file(path: str | os.PathLike[str]) -> Path:
    """Return the local file to write; it may exist, and is then replaced.

    Raises:
        CheckpointError: it is a URL or a directory, or its directory cannot be written.
    """
    file = _local(path)
    if file.is_dir():
        raise CheckpointError("is a directory", path=file, expected="a file", remedy="name a file in it")
    output_directory(file.absolute().parent)
    return file


def require_empty(directory: Path) -> None:
    """Check that a directory is missing or holds nothing but strays.

    Raises:
        CheckpointError: it holds something.
    """
    entries = os.listdir(directory) if directory.is_dir() else []
    if found := sorted(name for name in entries if not is_stray(name)):
        raise CheckpointError(
            "is not empty", path=directory, expected="a directory that is missing or empty",
            found=", ".join(found[:5]), remedy="choose a new directory",
        )  # fmt: skip


def _local(path: str | os.PathLike[str]) -> Path:
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise CheckpointError(
            "is not a path", path=repr(text), expected="a local directory", remedy="name a directory"
        )
    is_file_url = text.lower().startswith("file:") and isinstance(path, str)
    if _REMOTE.match(text) and not is_file_url:
        raise CheckpointError(
            "cannot be written: it is a URL",
            path=text,
            expected="a local path",
            remedy="write to a local directory, and copy it there; an absolute path is never taken for a URL",
        )
    local = local_path(path)
    assert local is not None
    return local


def _require_directory(directory: Path) -> None:
    """Check that a directory, and each above it, is one or missing. Raises `OSError` too."""
    for place in (directory, *directory.absolute().parents):
        try:
            os.stat(place)
        except FileNotFoundError:
            if place.is_symlink():
                raise CheckpointError(
                    "is a symbolic link to nothing", path=place, found=os.readlink(place),
                    remedy="make what it points to, or choose another directory",
                ) from None  # fmt: skip
            continue
        except NotADirectoryError:
            continue  # the file is found above
        if not place.is_dir():
            raise CheckpointError(
                "is a file", path=place, expected="a directory", remedy="choose another directory"
            )
        return


def _require_outside(directory: Path, entry: object) -> None:
    if not isinstance(entry, str | os.PathLike):
        return
    local = local_path(entry)
    if local is None or not local.exists():
        return
    place, taken = Path(os.path.realpath(directory)), Path(os.path.realpath(local))
    if place == taken or (taken.is_dir() and place.is_relative_to(taken)):
        where = "is the input itself" if place == taken else f"lies within the input {local}"
        raise CheckpointError(
            where, path=directory, expected="a directory outside of what is read",
            remedy="choose another directory",
        )  # fmt: skip


def _require_writable(directory: Path) -> None:
    """Raise `OSError` where a file could not be made in the nearest directory that exists."""
    if len(os.fsencode(directory.absolute())) + _LONGEST_NAME > os.pathconf("/", "PC_PATH_MAX"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    nearest = next(place for place in (directory, *directory.absolute().parents) if place.is_dir())
    tempfile.TemporaryFile(dir=nearest).close()
