"""The log file of a long run, beside what it makes: one line per minute and per layer, with the time in UTC.

Restarts append to it, so that it tells the whole story of an artifact.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from qmoe_jax.files.errors import printable
from qmoe_jax.files.location import local_path
from qmoe_jax.files.output import output_file
from qmoe_jax.memory import usable_memory
from qmoe_jax.progress import SECONDS_PER_LINE, ProgressCallback, ProgressMeter, no_progress

PACKAGES = ("qmoe-jax", "jax", "jaxlib", "numpy")


def log_path(output: str | os.PathLike[str], scratch: str | os.PathLike[str] | None = None) -> Path:
    """Return where the log of an artifact lies: beside it; where that is a URL, beside the scratch folder."""
    local = local_path(output)
    if local is None:
        local = Path(scratch or re.sub(r"[^\w.-]+", "-", os.fspath(output)))
    place = local.expanduser().absolute()
    return place.with_name(f"{place.name}.log")


class RunLog:
    """A progress callback that writes a log file and calls another one.

    As a context manager it logs the beginning, warnings, and the error that ends the context or the end.
    """

    def __init__(
        self,
        file: Path,
        facts: Mapping[str, object],
        progress: ProgressCallback = no_progress,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepare the log.

        Args:
            file: the file, to which lines are appended.
            facts: what is logged at the beginning beside command, versions and machine, by name.
            progress: the callback to call, such as a bar.
            clock: returns seconds.

        Raises:
            CheckpointError: the file cannot be written there.
        """
        self.file = output_file(file)
        self._facts, self._progress, self._clock = facts, progress, clock
        self._meter = ProgressMeter("", "work", clock)
        self._lock, self._failed = threading.Lock(), False
        self._part, self._next_line = "", 0.0

    def __call__(self, done: int, total: int, label: str) -> None:
        """Take progress, log it at the first call of a minute or layer, and hand it on."""
        self._meter.update(done, total, label)
        part, now = label.partition(",")[0], self._clock()
        if label and (part != self._part or now >= self._next_line):
            self._part, self._next_line = part, now + SECONDS_PER_LINE
            self.write(self._meter.line.removeprefix(" · "))
        self._progress(done, total, label)

    def write(self, text: object) -> None:
        """Append a line with the time in front; lines that follow in `text` are indented.

        Where the disk refuses, a warning says so once, and the run goes on.
        """
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = f"{now} {printable(text)}".replace("\n", "\n    ") + "\n"
        with self._lock:
            if not self._failed:
                self._append(line)

    def _append(self, text: str) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            self._failed = True
            self._show_warning(
                f"{self.file}: the log cannot be written: {error.strerror}", UserWarning, "", 0
            )

    def _warn(self, message: Any, category: Any, *arguments: Any) -> None:
        self.write(f"warning: {message}")
        self._show_warning(message, category, *arguments)

    def __enter__(self) -> Self:
        """Log the beginning, and from now on warnings."""
        self._show_warning: Callable[..., Any] = warnings.showwarning
        warnings.showwarning = self._warn  # type: ignore[assignment]
        self.write(f"begin: {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
        for name, value in {**machine(), **self._facts}.items():
            self.write(f"{name}: {value}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Log the end, or the error."""
        warnings.showwarning = self._show_warning
        if error is None:
            self.write("end")
        elif isinstance(error, KeyboardInterrupt):
            self.write(f"stopped by {'Ctrl-C' if type(error) is KeyboardInterrupt else 'SIGTERM'}")
        else:
            self.write(f"error: {type(error).__name__}: {error}")


def machine() -> dict[str, str]:
    """Return the software and the machine of this process, for a log."""
    devices = jax.local_devices()
    return {
        "versions": ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
        + f", Python {platform.python_version()}",
        "machine": f"{platform.node()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{usable_memory() / 1e9:.1f} GB of memory, {len(devices)} x {devices[0].device_kind}",
        "process": f"{os.getpid()}, {jax.process_index()} of {jax.process_count()}",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
