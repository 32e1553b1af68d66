"""Output: results go to stdout, notes to stderr where it is a terminal, warnings always to stderr."""

from __future__ import annotations

import dataclasses
import json
import math
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
        with console.status(text):
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
    """Print one JSON object to stdout."""
    print(json.dumps(to_json(fields), ensure_ascii=False, allow_nan=False), flush=True)
