"""Text files: found in folders, told apart by their last suffix, opened, and standard input among them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO

from qmoe_jax.data.archives import OPENERS, decompressed, zstd_module
from qmoe_jax.data.errors import TextError
from qmoe_jax.data.parquet import pyarrow_parquet
from qmoe_jax.files.location import local_path

KINDS = {".txt": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
"""Kinds of files, by its last suffix in lower case, before that of a compression."""

READ = f"a name that ends in {', '.join(KINDS)}, and after it {', '.join(OPENERS)} if compressed"
"""The names that are read, for messages."""

STDIN = ("-", "/dev/stdin")
_UNREAD_COMPRESSIONS = (".7z", ".br", ".lz", ".lz4", ".lzma", ".rar", ".sz", ".tar", ".tgz", ".z", ".zip")
_NAMED = 5  # number of files that a message names

_read_pipes: set[tuple[int, int]] = set()
"""Device and inode of the pipes that this process has read from."""


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text.

    Attributes:
        path: its path; `-` is standard input.
        kind: a value of `KINDS`; None where the name does not tell, so that the text itself must.
        compression: a key of `OPENERS`, or empty for none; None where the first bytes must tell.
    """

    path: pathlib.Path
    kind: str | None
    compression: str | None

    @classmethod
    def of(cls, path: pathlib.Path) -> TextFile:
        """Return the file at `path` with what its name says, in any case of letters.

        A name without a suffix of text, such as that of a pipe, leaves it to the text.

        Raises:
            TextError: the name ends in a suffix that is not read, or the library for it is not installed.
        """
        *_, first, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
        compression, suffix = (last, first) if last in OPENERS else ("", last)
        if str(path) in STDIN or (suffix not in KINDS and _pipe(path)):
            return cls(path, None, None)
        if compression == ".zst":
            zstd_module(path)
        if not suffix:
            return cls(path, None, compression or None)
        if suffix not in KINDS:
            raise TextError(
                f"a name that ends in {suffix}{compression} does not tell how to read it",
                path=path,
                expected=READ,
                remedy="rename the file, or pass it on standard input (-), where the text itself tells",
            )
        if KINDS[suffix] == "parquet":
            pyarrow_parquet(path)
            if compression or _pipe(path):
                raise TextError(
                    "Parquet is read from an uncompressed file only",
                    path=path,
                    expected="a file whose name ends in .parquet",
                    remedy="decompress it, or write it to a file",
                )
        return cls(path, KINDS[suffix], compression)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading, decompressed; a pipe can be opened once.

        Raises:
            TextError: the file cannot be read, is not what its name says or is damaged, or is a pipe that was
                read before.
        """
        with _open(self.path) as stream, decompressed(stream, self.path, self.compression) as text:
            yield text


def text_files(path: str | os.PathLike[str]) -> list[TextFile]:
    """Return the text files at `path`: the file itself, or those of a folder.

    A path may be a file URL, and `~` is the home. A folder is searched at any depth, through links too, each
    file once, in the order of its path's bytes. Hidden files and folders (`.name`, `name~`, `__MACOSX`) and
    names that are not read are left out; a folder or file that is named itself may be hidden.

    Raises:
        TextError: `path` does not exist, is a URL or a folder without text, or holds a broken link or text
            in a compression that is not read.
        CheckpointError: `path` is a file URL that `local_path` refuses.
    """
    if not os.fspath(path):
        raise TextError("the path of a text is empty", expected="a file or a folder (. for the current one)")
    if str(path) in STDIN:
        return [TextFile.of(pathlib.Path(path))]
    local = local_path(path)
    if local is None:
        raise TextError(
            "is a URL, and text is read from local files only",
            path=path,
            expected="a file, a folder with text files, or - for standard input",
            remedy="download it, or pipe it to standard input (curl -sL URL | ... -)",
        )
    path = local
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise TextError(
            "no text found there",
            path=path,
            expected="a file, a folder with text files, or - for standard input",
            found=error.strerror,
            remedy="check the path",
        ) from error
    if not folder:
        return [TextFile.of(path)]
    present = list(_walk(path))
    found = [TextFile.of(file) for file in present if _is_text(file)]
    if not found:
        names = [str(file.relative_to(path)) for file in present]
        raise TextError(
            "no text found in this folder",
            path=path,
            expected=f"a file with {READ}",
            found=f"{', '.join(names[:_NAMED])}{', ...' if names[_NAMED:] else ''}" or "no files",
        )
    return found


def check_pipes(*uses: list[TextFile]) -> None:
    """Check that no pipe is to be read twice, within one use or by two.

    Raises:
        TextError: one is.
    """
    pipes: set[tuple[int, int]] = set()
    for file in (file for use in uses for file in use):
        if (pipe := _pipe(file.path)) in pipes:
            raise _read_before(file.path)
        pipes |= {pipe} if pipe else set()


def _is_text(file: pathlib.Path) -> bool:
    """Return True for a file to read. Raises `TextError` for text that would be left out silently."""
    *_, first, last = ("", "", *(suffix.lower() for suffix in file.suffixes))
    if last in _UNREAD_COMPRESSIONS and first in KINDS:
        raise TextError(
            f"text compressed as {last} is not read",
            path=file,
            expected=READ,
            remedy="decompress the file, or move it out of the folder",
        )
    return (first if last in OPENERS else last) in KINDS


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.endswith("~") or name == "__MACOSX"


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the regular files of a folder that are not hidden, each once."""
    top, seen, found = os.path.realpath(folder), set(), []

    def refuse(error: OSError) -> None:
        raise TextError(
            "cannot be read", path=error.filename, found=error.strerror, remedy="check its permissions"
        ) from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen or (real != top and os.path.commonpath([real, top]) == real):
            folders.clear()  # a link to a folder that was walked, or back up
            continue
        seen.add(real)
        folders[:] = sorted((name for name in folders if not _is_hidden(name)), key=os.fsencode)
        found += [pathlib.Path(place, name) for name in names if not _is_hidden(name)]
    for file in sorted(found, key=lambda file: [os.fsencode(part) for part in file.parts]):
        try:
            regular = stat.S_ISREG(file.stat().st_mode)
        except OSError as error:
            if not _is_text(file):
                continue
            raise TextError(
                "is a broken link" if file.is_symlink() else "cannot be read",
                path=file,
                found=error.strerror,
                remedy="restore the file, or remove it from the folder",
            ) from error
        if regular and (real := os.path.realpath(file)) not in seen:
            seen.add(real)
            yield file


@contextmanager
def _open(path: pathlib.Path) -> Iterator[BinaryIO]:
    if pipe := _pipe(path):
        if pipe in _read_pipes:
            raise _read_before(path)
        _read_pipes.add(pipe)
    try:
        if str(path) in STDIN:
            stdin = getattr(sys.stdin, "buffer", None)
            if stdin is None:
                raise TextError("is closed, or replaced", path="standard input", remedy="pass a file")
            yield stdin
            return
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise TextError(
            "cannot be read",
            path=path,
            found=error.strerror or error,
            remedy="check its permissions, and the disk",
        ) from error


def _pipe(path: pathlib.Path) -> tuple[int, int] | None:
    """Return device and inode of a pipe or standard input; None for a file that can be read again."""
    stdin = str(path) in STDIN
    try:
        status = os.fstat(sys.stdin.fileno()) if stdin else path.stat()
    except (OSError, ValueError, AttributeError):  # no such file; standard input closed or replaced
        return None
    return None if stat.S_ISREG(status.st_mode) and not stdin else (status.st_dev, status.st_ino)


def _read_before(path: pathlib.Path) -> TextError:
    return TextError(
        "is a pipe that is to be read twice",
        path=path,
        expected="a pipe for one purpose, since it can be read once",
        remedy="write its text to a file, and pass that",
    )
