"""Recognition of files that hold something else than their names say: pointers, error pages, archives.

Called where a file could not be parsed, so that the error says what lies there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qmoe_jax.files.errors import CheckpointError

HEAD_BYTES = 512
"""Bytes of a file's beginning that suffice to recognize it."""


@dataclasses.dataclass(frozen=True)
class Foreign:
    """The content of a file that is not the one expected, in words, and the remedy."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        """Return both in words."""
        return f"{self.problem}; {self.remedy}"


_GIT_LFS = Foreign(
    "is a git-lfs pointer, not the file itself", "run `git lfs pull` in the repository that it came from"
)
_GIT_ANNEX = Foreign(
    "is a git-annex pointer, not the file itself", "run `git annex get` in the repository that it came from"
)
_WEB_PAGE = Foreign(
    "is a web page (HTML), not the file itself",
    "download the file again; the page may ask for a login or tell of an error",
)
_SERVER_MESSAGE = Foreign(
    "is a message of a server, not the file itself", "download the file again, with access to it"
)
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}
_OTHER_FORMATS = {b"\x89HDF": "an HDF5 file (TensorFlow, Keras)", b"GGUF": "a GGUF file (llama.cpp)"}
_SERVER_MESSAGES = (
    b"<?xml",
    b"<error>",
    b"entry not found",
    b"repository not found",
    b"invalid username or password",
    b"access to model",
)


def recognize(head: bytes) -> Foreign | None:
    """Return what a file is that begins with `head` (`HEAD_BYTES` bytes); None for nothing known here."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"version https://git-lfs.", b"version https://hawser.")):
        return _GIT_LFS
    if text.startswith(b"/annex/objects/"):
        return _GIT_ANNEX
    if text.startswith((b"<!doctype html", b"<html")):
        return _WEB_PAGE
    if text.startswith(_SERVER_MESSAGES):
        return _SERVER_MESSAGE
    for start, kind in _ARCHIVES.items():
        if head.startswith(start):
            return Foreign(f"is {kind}, not the file itself", "unpack it")
    if head[257:262] == b"ustar":
        return Foreign("is a tar archive, not the file itself", "unpack it")
    for start, kind in _OTHER_FORMATS.items():
        if head.startswith(start):
            return Foreign(f"is {kind}", "use a checkpoint in a format that is read here")
    return None


def foreign_error(path: object, head: bytes | None = None) -> CheckpointError | None:
    """Return the error for a file that is recognized as something else; None where it is not.

    Args:
        path: the file.
        head: its first bytes; None: they are read from `path`.
    """
    head = read_head(Path(str(path))) if head is None else head[:HEAD_BYTES]
    if (known := recognize(head)) is None:
        return None
    lines = head.decode(errors="replace").splitlines() if known in (_GIT_LFS, _SERVER_MESSAGE) else []
    found = " ".join(lines)[:200].strip() or None
    return CheckpointError(known.problem, path=path, found=found, remedy=known.remedy)


def read_head(path: Path) -> bytes:
    """Return the first `HEAD_BYTES` bytes of a file, or none of one that cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(HEAD_BYTES)
    except (OSError, ValueError):  # a path with a NUL is a ValueError
        return b""
