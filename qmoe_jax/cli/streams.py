"""Standard streams that fail without an exception: closed pipes, full disks, any encoding.

A program must not die of where its output goes. Its standard streams go silent at their first failure, which
`run_program` reports when the work is done: quietly for a pipe whose reader left, as an error for all else.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from qmoe_jax.cli.console import stderr, warn
from qmoe_jax.cli.failures import BROKEN_PIPE, FAILED, Terminated, report, traceback_wanted

CLOSED = "is closed; direct it to a file, or to /dev/null where its results do not matter"


class Descriptor(io.FileIO):
    """A file descriptor for writing that goes silent at its first failure.

    Attributes:
        failure: the first error; None while all is well.
        lost: the bytes that could not be written, unless the reader of a pipe left.
    """

    def __init__(self, number: int, failure: OSError | None = None):
        super().__init__(number, "w", closefd=False)
        self.failure = failure
        self.lost = bytearray()

    def write(self, data: Any) -> int:
        """Write to the descriptor, waiting where it does not block, or keep what cannot be written."""
        if self.failure is None:
            try:
                while (written := super().write(data)) is None:
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.failure = error
        if self.failure.errno != errno.EPIPE:
            self.lost += data
        return len(data)


def run_program(main: Callable[[], object]) -> NoReturn:
    """Run the main function of a program, and exit.

    - Standard output that is closed or full: an error and exit code 1 once the work is done; what could not
      be written goes to standard error. A pipe whose reader left: exit code 141, as of a program that SIGPIPE
      ends, and no message.
    - Standard error that is closed or full: silence.
    - Characters that a stream's encoding lacks are written as escapes, such as \\xe4.
    - Ctrl-C and SIGTERM: one line, and exit code 130 or 143. Other errors: a message, and exit code 1.
    """
    out, err = _open_streams()
    warnings.showwarning = lambda text, *_: warn(text)
    signal.signal(signal.SIGTERM, _terminate)
    code = _exit_code(main)
    # Neither flush raises: their descriptors go silent.
    sys.stdout.flush()
    if out.failure is not None:
        code = code or _report(out)
    sys.stderr.flush()
    for descriptor in (out, err):
        if descriptor.failure is not None:
            _discard(descriptor.fileno())  # for the interpreter's own flush, and for other libraries
    sys.exit(code)


def _open_streams() -> tuple[Descriptor, Descriptor]:
    """Replace sys.stdout and sys.stderr, and return their descriptors.

    A descriptor that is closed is opened on /dev/null, so that no file of the program takes its number.
    """
    closed = [stream is None for stream in (sys.stdout, sys.stderr)]
    encodings = [getattr(stream, "encoding", "utf-8") for stream in (sys.stdout, sys.stderr)]
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    descriptors, streams = [], []
    for number, was_closed, encoding in zip((1, 2), closed, encodings, strict=True):
        failure = OSError(errno.EBADF, CLOSED) if was_closed else None
        descriptor = Descriptor(number, failure)
        descriptors.append(descriptor)
        line_buffering = number == 2 or descriptor.isatty()
        streams.append(
            io.TextIOWrapper(
                io.BufferedWriter(descriptor), encoding, "backslashreplace", line_buffering=line_buffering
            )
        )
    sys.stdout, sys.stderr = streams
    return descriptors[0], descriptors[1]


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _exit_code(main: Callable[[], object]) -> int:
    """Return the exit code of `main`, having reported what it raises."""
    try:
        main()
    except SystemExit as exit:
        if isinstance(exit.code, str):
            stderr().print(exit.code, soft_wrap=True)
            return FAILED
        return exit.code or 0
    except BaseException as error:
        if traceback_wanted() and isinstance(error, Exception):
            raise
        return report(error)
    return 0


def _report(out: Descriptor) -> int:
    """Report the failure of standard output, and return the exit code."""
    assert out.failure is not None
    if out.failure.errno == errno.EPIPE:
        return BROKEN_PIPE
    if not out.lost:
        return 0
    failure = OSError(out.failure.errno, out.failure.strerror, "standard output")
    code = report(failure)
    stderr().print("what could not be written follows:")
    sys.stderr.write(out.lost.decode("utf-8", "backslashreplace"))
    return code


def _discard(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
