"""The error for a checkpoint or artifact that cannot be read or written."""

from __future__ import annotations


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
        self.problem, self.path, self.key = problem, str(path), key
        self.expected, self.found, self.remedy = expected, found, remedy
        details = {"key": key, "expected": expected, "found": found, "remedy": remedy}
        lines = [f"  {label}: {value}" for label, value in details.items() if value is not None]
        super().__init__("\n".join([f"{path}: {problem}", *lines]))

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
