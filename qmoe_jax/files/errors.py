"""The error for a checkpoint or artifact that cannot be read or written, and the system's errors as such."""

from __future__ import annotations

import errno
import os
import re
from typing import Any

_SPACE = "free some space on that disk, then run the same command again"
_PERMISSION = "choose a location where you have read and write permission"
_HARDWARE = "check the disk and its connection; the system's log says more"

REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose a file system with larger files",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "choose a location on a writable file system",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the system's limit of open files",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "check the symbolic links on the path",
    errno.ENOTDIR: "choose a path whose parents are directories",
    errno.EISDIR: "name a file, not a directory",
    errno.EIO: _HARDWARE,
    errno.ENODEV: _HARDWARE,
    errno.ENXIO: _HARDWARE,
    errno.ESTALE: "mount the network file system again, then run the same command again",
    errno.ETIMEDOUT: "wait for the file server, then run the same command again",
    errno.ENOMEM: "free some memory, or raise the limit of this process",
    errno.EILSEQ: "choose a name that the file system allows, of ASCII characters",
}
"""Remedies for errors of the system, by their number."""

LONGEST = 600
"""Characters of each part of a message: more of a damaged file's content tells nothing more."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written, as data and as a message.

    Attributes:
        path: the file, directory or URL.
        problem: what is wrong with it.
        key: the tensor, parameter or JSON member concerned; None for the whole file.
        expected, found: what should be there and what is; None where the problem says it all.
        remedy: what to do about it; None where nothing general helps.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: object,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ):
        self.problem, self.path, self.key = problem, str(path), key if key is None else _shown(key)
        self.expected, self.found, self.remedy = _shown(expected), _shown(found), remedy
        details = {"key": self.key, "expected": self.expected, "found": self.found, "remedy": remedy}
        lines = [f"  {label}: {value}" for label, value in details.items() if value is not None]
        super().__init__(printable("\n".join([f"{path}: {problem}", *lines])))

    def with_remedy(self, remedy: str) -> CheckpointError:
        """Return the error with what a caller that knows more advises."""
        return CheckpointError(
            self.problem,
            path=self.path,
            key=self.key,
            expected=self.expected,
            found=self.found,
            remedy=remedy,
        )


def system_error(
    problem: str, path: object, error: Exception, *, key: str | None = None, expected: str | None = None
) -> CheckpointError:
    """Return the error for what the system refused: its words, and the remedy where one is known.

    Args:
        problem: what could not be done.
        path: the file or directory concerned.
        error: an `OSError`, or an error of tensorstore, which has the system's number in its text.
        key: as in `CheckpointError`.
        expected: likewise.
    """
    number = error_number(error)
    found = os.strerror(number) if number else str(error).splitlines()[0] if str(error) else repr(error)
    remedy = REMEDIES.get(number or 0)
    return CheckpointError(problem, path=path, key=key, expected=expected, found=found, remedy=remedy)


def error_number(error: BaseException) -> int | None:
    """Return the system's number of an error (`errno`), also of an error of tensorstore; None without one."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None


def _shown(value: Any) -> Any:
    """Return a value, or its text where that is too long or cannot be printed as it is."""
    try:
        text = str(value)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nested lists
        return f"something that has no text: {error}"
    shown = printable(text)
    if len(shown) > LONGEST:
        shown = f"{shown[:LONGEST]} and {len(shown) - LONGEST:,} characters more"
    return value if shown == text else shown


def printable(text: object) -> str:
    r"""Return a text that every UTF-8 terminal prints: bytes of a path that are not UTF-8 as `\xe9`."""
    try:
        encoded = str(text).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that no path holds
        encoded = str(text).encode("utf-8", "backslashreplace")
    return encoded.decode("utf-8", "backslashreplace")
