"""Output: results go to stdout, notes to stderr where it is a terminal, warnings always to stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

PIPED_WIDTH = 160
"""Columns without a terminal: wide enough for the lines of tables, so that they can be searched."""


def stdout() -> Console:
    """Return the console for results, which prints texts as they are: a path is never taken for markup."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return the console for notes, warnings and errors."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    options: dict[str, Any] = {"stderr": stderr, "markup": False, "highlight": False, "emoji": False}
    console = Console(**options)
    return console if console.is_terminal else Console(**options, width=PIPED_WIDTH)


def note(text: RenderableType) -> None:
    """Print a text that matters only to a person at the terminal."""
    if (console := stderr()).is_terminal:
        console.print(text, style="dim", soft_wrap=True)


def warn(text: object) -> None:
    """Print a warning."""
    stderr().print(f"warning: {text}", style="yellow", soft_wrap=True)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Print the API's warnings, at once, while the context lasts."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: warn(message)
        yield


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show a spinner with `text` while the context lasts, for work whose progress is unknown."""
    if (console := stderr()).is_terminal:
        with console.status(text, spinner="dots" if console.encoding.startswith("utf") else "line"):
            yield
    else:
        yield


def to_json(value: Any) -> Any:
    """Convert a value to JSON's types.

    Dataclasses and mappings become objects, arrays lists, NaN and infinity null.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def print_json(fields: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout, in ASCII whatever the terminal's encoding.

    Bytes of a path that are not UTF-8 are written \\udc80 to \\udcff, as `os.fsdecode` stands for them.
    """
    _write_bytes(json.dumps(to_json(fields), allow_nan=False).encode("ascii") + b"\n")


@dataclasses.dataclass(frozen=True)
class Verbatim:
    """A text that goes out as it is, with its line ending: no tab is expanded, no character left out."""

    text: str


CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
"""Control characters, as a terminal shows them."""


def print_verbatim(part: Verbatim) -> None:
    """Print a text to stdout: in UTF-8 whatever the locale, byte for byte.

    A terminal is shown control characters other than tabs and line ends as escapes, such as \\x1b, so that a
    text cannot drive it.
    """
    if sys.stdout.isatty():
        sys.stdout.write(part.text.replace("\r\n", "\n").translate(CONTROL))
    else:
        _write_bytes(part.text.encode("utf-8"))


def _write_bytes(content: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.flush()
