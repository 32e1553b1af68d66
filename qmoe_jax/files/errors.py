"""The error for a checkpoint or artifact that cannot be read or written."""

from __future__ import annotations

from typing import Any

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
        self.problem, self.path, self.key = problem, str(path), key if key is None else _printable(key)
        self.expected, self.found, self.remedy = _printable(expected), _printable(found), remedy
        details = {"key": self.key, "expected": self.expected, "found": self.found, "remedy": remedy}
        lines = [f"  {label}: {value}" for label, value in details.items() if value is not None]
        super().__init__("\n".join([f"{path}: {problem}", *lines]))


def _printable(value: Any) -> Any:
    """Return a value, or its text where that is too long or cannot be printed as it is."""
    try:
        text = str(value)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nested lists
        return f"something that has no text: {error}"
    shown = text.encode("utf-8", "backslashreplace").decode()
    if len(shown) > LONGEST:
        shown = f"{shown[:LONGEST]} and {len(shown) - LONGEST:,} characters more"
    return value if shown == text else shown
