"""The error for a text or a tokenizer that cannot be used."""

from __future__ import annotations

from qmoe_jax.files.errors import printable


class TextError(ValueError):
    """A text or tokenizer that cannot be used, as data and as a message.

    Attributes:
        problem: the fault.
        path: the file or folder; None where the problem names it.
        line: number of the line or Parquet row in it, from 1; None for the whole file.
        key: the setting or token concerned; None where there is none.
        expected, found: what should be there and what is; None where the problem says it all.
        remedy: what to do about it; None where nothing general helps.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: object = None,
        line: int | None = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ):
        self.problem, self.path, self.line, self.key = problem, None if path is None else str(path), line, key
        self.expected, self.found, self.remedy = expected, found, remedy
        details = {"key": key, "expected": expected, "found": found, "remedy": remedy}
        lines = [f"  {label}: {value}" for label, value in details.items() if value is not None]
        super().__init__(printable("\n".join([f"{self.where}{problem}", *lines])))

    @property
    def where(self) -> str:
        """The place as a message begins with it: `file, line 7: `; empty without a path."""
        if self.path is None:
            return ""
        return f"{self.path}: " if self.line is None else f"{self.path}, line {self.line}: "
