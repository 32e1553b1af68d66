"""Messages for errors: what happened, where, what was expected and found, and the remedy."""

from __future__ import annotations

import os
from typing import Any

import jax

from qmoe_jax.cli.console import stderr
from qmoe_jax.data import TextError
from qmoe_jax.files.errors import REMEDIES, CheckpointError, printable

OK, FAILED, PROBLEMS, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 3, 130, 141, 143
"""Exit codes: OK; an error; `verify` found problems; 128 + the signals of Ctrl-C, of a closed pipe and of
`kill`. Wrong usage exits with 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM. Its message, like that of a `KeyboardInterrupt`, says what remains and how to continue."""


def report(error: BaseException) -> int:
    """Print an error or an interrupt to standard error, and return its exit code."""
    if isinstance(error, KeyboardInterrupt):
        ended = isinstance(error, Terminated)
        stderr().print(f"{'terminated' if ended else 'interrupted'}. {error}".rstrip(), soft_wrap=True)
        return TERMINATED if ended else INTERRUPTED
    if not isinstance(error, Exception):
        raise error
    stderr().print(message(describe(error)), style="red", soft_wrap=True)
    return FAILED


def traceback_wanted() -> bool:
    """Return True where QMOE_DEBUG is set in the environment, to other than 0."""
    return os.environ.get("QMOE_DEBUG", "") not in ("", "0")


def describe(error: Exception) -> dict[str, Any]:
    """Return an error as data.

    The members are `type` and `problem`, and where known `path`, `line`, `key`, `expected`, `found` and
    `remedy`.
    """
    kind = type(error).__name__
    if isinstance(error, TextError):
        names = ("problem", "path", "line", "key", "expected", "found", "remedy")
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
    elif isinstance(error, ValueError | NotImplementedError | ImportError):
        fields = {"problem": str(error)}
    elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        fields = {
            "problem": "out of the device's memory",
            "found": str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0] or None,
            "remedy": "make batches smaller, or keep experts elsewhere: --experts host or --experts disk",
        }
    elif isinstance(error, MemoryError):
        fields = {"problem": "out of memory", "found": str(error) or None}
    else:
        fields = {
            "problem": f"{kind}: {error}",
            "remedy": "this may be a bug in qmoe: run the command with --debug, and report the traceback",
        }
    return {"type": kind} | {name: value for name, value in fields.items() if value is not None}


def message(fields: dict[str, Any]) -> str:
    """Return the lines to print for an error that `describe` returned."""
    line = f", line {fields['line']}" if "line" in fields else ""
    where = f"{fields['path']}{line}: " if "path" in fields else ""
    details = [
        f"  {name}: {fields[name]}" for name in ("key", "expected", "found", "remedy") if name in fields
    ]
    return printable("\n".join([f"error: {where}{fields['problem']}", *details]))
