"""Messages for errors: what happened, where, what was expected and found, and the remedy."""

from __future__ import annotations

import os
from typing import Any

from qmoe_jax.data import TextError
from qmoe_jax.files.errors import REMEDIES, CheckpointError, printable

OK, FAILED, PROBLEMS, INTERRUPTED = 0, 1, 3, 130
"""Exit codes: OK; an error; `verify` found problems; Ctrl-C. Wrong usage exits with 2."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says what remains and how to continue."""


def describe(error: Exception) -> dict[str, Any]:
    """Return an error as data.

    The members are `type` and `problem`, and where known `path`, `line`, `key`, `expected`, `found` and
    `remedy`.
    """
    kind = type(error).__name__
    if isinstance(error, TextError):
        names = ("problem", "path", "line", "expected", "found", "remedy")
        fields = {name: getattr(error, name) for name in names}
    elif isinstance(error, CheckpointError):
        fields = {
            name: getattr(error, name) for name in ("problem", "path", "key", "expected", "found", "remedy")
        }
    elif isinstance(error, OSError):
        fields = {
            "problem": error.strerror or str(error) or kind,
            "path": None if error.filename is None else os.fsdecode(error.filename),
            "remedy": REMEDIES.get(error.errno or 0),
        }
    elif isinstance(error, ValueError):
        fields = {"problem": str(error)}
    elif isinstance(error, MemoryError):
        fields = {"problem": "out of memory", "found": str(error) or None}
    else:
        fields = {
            "problem": f"{kind}: {error}",
            "remedy": "this may be a bug in qmoe: run the command with --debug, and report the traceback",
        }
    return {"type": kind} | {
        name: printable(value) if isinstance(value, str) else value
        for name, value in fields.items()
        if value is not None
    }


def message(fields: dict[str, Any]) -> str:
    """Return the lines to print for an error that `describe` returned."""
    line = f", line {fields['line']}" if "line" in fields else ""
    where = f"{fields['path']}{line}: " if "path" in fields else ""
    details = [
        f"  {name}: {fields[name]}" for name in ("key", "expected", "found", "remedy") if name in fields
    ]
    return "\n".join([f"error: {where}{fields['problem']}", *details])
