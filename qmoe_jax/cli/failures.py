"""What a person reads instead of a traceback: what is wrong, where, what was expected and found, what to do."""

from __future__ import annotations

import errno
from typing import Any

OK, FAILED, PROBLEMS, INTERRUPTED = 0, 1, 3, 130
"""Exit codes: all is well; an error; `verify` found problems; Ctrl-C. Wrong usage exits with 2."""

REMEDIES = {
    errno.ENOSPC: "free some space on that disk, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what to know about it as its message."""


def describe(error: Exception) -> dict[str, Any]:
    """An error as data: `type`, `problem`, and where they are known `path`, `key`, `expected`, `found`, `remedy`."""
    from qmoe_jax.files.errors import CheckpointError

    kind = type(error).__name__
    if isinstance(error, CheckpointError):
        fields = {
            name: getattr(error, name) for name in ("problem", "path", "key", "expected", "found", "remedy")
        }
    elif isinstance(error, OSError):
        fields = {
            "problem": error.strerror or str(error) or kind,
            "path": error.filename,
            "remedy": REMEDIES.get(error.errno or 0),
        }
    elif isinstance(error, ValueError):
        fields = {"problem": str(error)}
    elif isinstance(error, MemoryError):
        fields = {"problem": "out of memory", "found": str(error) or None}
    else:
        fields = {
            "problem": f"{kind}: {error}",
            "remedy": "this may be a mistake in qmoe itself: --debug shows where it happened",
        }
    return {"type": kind} | {name: value for name, value in fields.items() if value is not None}


def message(fields: dict[str, Any]) -> str:
    """The lines that say what `describe` found."""
    where = f"{fields['path']}: " if "path" in fields else ""
    details = [
        f"  {name}: {fields[name]}" for name in ("key", "expected", "found", "remedy") if name in fields
    ]
    return "\n".join([f"error: {where}{fields['problem']}", *details])
