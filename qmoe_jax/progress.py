"""Progress of long work: one kind of callback, and a bar for the terminal that is one."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Self, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

ProgressCallback = Callable[[int, int, str], object]
"""`progress(done, total, label)`: units of work done, units in all, and the current step in a few words.

Functions that take one call it from the thread they were called in: first with `done` = 0, then with growing
`done`, at last with `done` = `total`.
"""


def no_progress(done: int, total: int, label: str) -> None:
    """Ignore progress: the default of every function that reports it."""


class Tally:
    """Work done so far, reported to a callback whenever it grows or another step begins."""

    def __init__(self, progress: ProgressCallback, total: int):
        """Report to `progress` that none of `total` units is done."""
        self._progress, self._total = progress, total
        self._done, self._label = 0, ""
        self.advance(0)

    def begin(self, label: str) -> None:
        """Report that a step begins."""
        self._label = label
        self.advance(0)

    def advance(self, units: int) -> None:
        """Report that `units` more are done."""
        self._done += units
        self._progress(self._done, self._total, self._label)


class _Quiet:
    """A text stream that goes silent when it can no longer be written, as a terminal that was closed."""

    def __init__(self, stream: IO[str]):
        self._stream, self._gone = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing once that has failed."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once writing has failed."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self._gone:
            try:
                action()
            except (OSError, ValueError):  # the latter where the stream itself was closed
                self._gone = True


class ProgressBar:
    """A progress callback that draws a bar with the step, units done, rate and time left.

    Used as a context manager, which also removes the bar after an error; without one, the bar ends when all
    is done. Draws nothing where output is not a terminal, and stops drawing where that is closed.

        with ProgressBar("compressing", "experts") as progress:
            qj.compress(path, output, examples, progress=progress)
    """

    def __init__(self, title: str, unit: str = "experts", console: Console | None = None):
        """Prepare a bar; it appears at the first call.

        Args:
            title: the work, in front of the current step.
            unit: name of the units of work, in the plural; "bytes" are scaled.
            console: where to draw; standard error by default.
        """
        console = console or Console(stderr=True)
        console.file = cast(IO[str], _Quiet(console.file))
        self._title, self._unit = title, unit
        amount = [MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}")]
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *([DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else amount),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __call__(self, done: int, total: int, label: str) -> None:
        """Draw `done` of `total` units, with the current step."""
        if not self._bar.task_ids:
            self._bar.start()
            self._bar.add_task(self._title, total=total, completed=done, rate="")
        task = self._bar.tasks[0]
        self._bar.update(
            task.id,
            total=total,
            completed=done,
            description=f"{self._title} · {label}" if label else self._title,
            rate=f"{task.speed:,.1f} {self._unit}/s" if task.speed else "",
        )
        if done >= total:
            self._bar.stop()

    def __enter__(self) -> Self:
        """Return the bar itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bar.stop()
