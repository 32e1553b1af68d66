"""Where output goes: results to stdout; progress and notes to stderr where it is a terminal, warnings always."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

PIPED_WIDTH = 160
"""Columns where there is no terminal: wide enough that no line of a table breaks, so that it can be searched."""


def stdout() -> Console:
    """The console for results. Texts are printed as they are: nothing in a path is taken for markup."""
    return _console(stderr=False)


def stderr() -> Console:
    """The console for all else."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    options: dict[str, Any] = {"stderr": stderr, "markup": False, "highlight": False, "emoji": False}
    console = Console(**options)
    return console if console.is_terminal else Console(**options, width=PIPED_WIDTH)


def note(text: RenderableType) -> None:
    """Say something that only a person at the terminal wants to know."""
    if (console := stderr()).is_terminal:
        console.print(text, style="dim", soft_wrap=True)


def warn(text: str) -> None:
    """Say something that must not be missed."""
    stderr().print(f"warning: {text}", style="yellow", soft_wrap=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show that something is under way which cannot say how far it has come."""
    if (console := stderr()).is_terminal:
        with console.status(text):
            yield
    else:
        yield


@contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; yields the function that says how much of how much is done. `unit` "bytes" is scaled."""
    if not (console := stderr()).is_terminal:
        yield lambda done, total: None
        return
    amount = [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    with Progress(TextColumn(title), BarColumn(), *amount, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def to_json(value: Any) -> Any:
    """A value as JSON has it: dataclasses and mappings as objects, arrays as lists, NaN and infinity as null."""
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
    """One JSON object on stdout."""
    print(json.dumps(to_json(fields), ensure_ascii=False, allow_nan=False), flush=True)
