"""Progress of long work: one kind of callback, and a bar that is one; without a terminal it writes lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Self, cast

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from qmoe_jax.memory import resident_memory

ProgressCallback = Callable[[int, int, str], object]
"""`progress(done, total, label)`: units of work done, units in all, and the current step in a few words.

Units take about the same time each, so that `total - done` tells the time left: experts, bytes or, where work
is of several kinds, millionths of the time that the whole is predicted to take, at the pace so far.

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


SECONDS_PER_LINE = 60
"""Seconds between the lines of a log."""


class ProgressMeter:
    """The state of long work as a progress callback hears of it: share done, rate, time passed and left."""

    def __init__(self, title: str, unit: str, clock: Callable[[], float] = time.monotonic):
        """Begin to count.

        Args:
            title: the work, in front of the current step.
            unit: name of the units of work, in the plural; "bytes" are scaled, "work" is shown in percent.
            clock: returns seconds.
        """
        self._title, self._unit, self._clock = title, unit, clock
        self._began = self._idle = self._heard = clock()
        self._first: int | None = None
        self.done, self.total, self.label = 0, 0, ""

    def update(self, done: int, total: int, label: str) -> None:
        """Take what a progress callback is called with."""
        self._heard = self._clock()
        if self._first is None:
            self._first, self._began = done, self._heard
        if done == self._first:
            self._idle = self._heard  # what comes before the first unit tells nothing about the others
        self.done, self.total, self.label = done, total, label

    @property
    def description(self) -> str:
        """The work and the current step."""
        return f"{self._title} · {self.label}" if self.label else self._title

    @property
    def seconds(self) -> float:
        """Seconds since the first call."""
        return self._clock() - self._began

    @property
    def seconds_left(self) -> float | None:
        """Seconds that are left if the rest goes as what is done; None while nothing is."""
        if not (done := self.done - (self._first or 0)):
            return None
        at_last_call = (self._heard - self._idle) * (self.total - self.done) / done
        return max(at_last_call - (self._clock() - self._heard), 0.0)

    @property
    def rate(self) -> str:
        """Units per second since the first of them began; empty while nothing is done."""
        done, seconds = self.done - (self._first or 0), self._heard - self._idle
        if not done or not seconds:
            return ""
        if self._unit == "work":
            per_minute = 6000 * done / seconds / self.total
            return f"{per_minute:,.1f} %/min" if per_minute >= 1 else f"{60 * per_minute:,.2f} %/h"
        return f"{decimal(int(done / seconds))}/s" if self._unit == "bytes" else (
            f"{done / seconds:,.1f} {self._unit}/s"
        )  # fmt: skip

    @property
    def line(self) -> str:
        """All of it in one line, with the memory of this process."""
        parts = [
            f"{100 * self.done / self.total:.1f} %" if self.total else "",
            self.rate,
            f"elapsed {_hours(self.seconds)}",
            "" if self.seconds_left is None else f"left {_hours(self.seconds_left)}",
            f"memory {decimal(resident_memory())}",
        ]
        return f"{self.description}: {', '.join(filter(None, parts))}"


def _hours(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class _LeftColumn(ProgressColumn):
    """The time that a meter says is left."""

    def __init__(self, meter: ProgressMeter):
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:
        """Return the time, or dashes where it is not known."""
        left = self._meter.seconds_left
        return Text("-:--:--" if left is None else _hours(left), style="progress.remaining")


class ProgressBar:
    """A progress callback that draws a bar with the step, what is done, the rate and the time left.

    Where output is not a terminal it writes one line per minute instead; it stops drawing where a terminal is
    closed. Used as a context manager, which also removes the bar after an error; without one, the bar ends
    when all is done.

        with ProgressBar("compressing", "work") as progress:
            qj.compress(path, output, examples, progress=progress)
    """

    def __init__(
        self,
        title: str,
        unit: str = "experts",
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepare a bar; it appears at the first call.

        Args:
            title: the work, in front of the current step.
            unit: name of the units of work, in the plural; "bytes" are scaled, "work" is shown in percent.
            console: where to draw; standard error by default.
            clock: returns seconds.
        """
        self._console = console or Console(stderr=True)
        self._console.file = cast(IO[str], _Quiet(self._console.file))
        self._meter, self._clock = ProgressMeter(title, unit, clock), clock
        self._next_line: float | None = None
        amounts: dict[str, list[ProgressColumn]] = {
            "bytes": [DownloadColumn()],
            "work": [TextColumn("{task.percentage:.1f} %")],
        }
        amount = amounts.get(unit, [MofNCompleteColumn(), TextColumn(unit)])
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *amount,
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            _LeftColumn(self._meter),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __call__(self, done: int, total: int, label: str) -> None:
        """Draw `done` of `total` units, with the current step."""
        meter = self._meter
        meter.update(done, total, label)
        if not self._console.is_terminal:
            self._write_line()
            return
        if not self._bar.task_ids:
            self._bar.start()
            self._bar.add_task(meter.description, total=total, completed=done, rate="")
        self._bar.update(
            self._bar.tasks[0].id,
            total=total,
            completed=done,
            description=meter.description,
            rate=meter.rate,
        )
        if done >= total:
            self._bar.stop()

    def _write_line(self) -> None:
        """Write a line if the last one, or the first call, was a minute ago."""
        now = self._clock()
        if self._next_line is not None and now >= self._next_line:
            self._console.print(self._meter.line, soft_wrap=True, markup=False, highlight=False)
            self._next_line = None
        if self._next_line is None:
            self._next_line = now + SECONDS_PER_LINE

    def __enter__(self) -> Self:
        """Return the bar itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bar.stop()
