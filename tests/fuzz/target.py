"""One reader under fuzzing, and the verdict on one input.

An input either loads, with a result that satisfies the reader's own checks, or is refused by an error of the
project whose message names the file. Anything else is a fault.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmoe_jax.files.errors import CheckpointError
from tests.fuzz import canary
from tests.fuzz.mutation import Mutator, change_bytes

PACKAGES = ("/qmoe_jax/", "/pallas_kernels/")
SECONDS_PER_INPUT = 5.0
# What a reader has no business with, as events of sys.addaudithook. numba's cache is made of pickles, so that
# of these only what executes is told.
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
)
_EXECUTES = {"os", "posix", "subprocess", "sys", "tests.fuzz.canary"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, and the sample that its inputs are made from.

    Attributes:
        name: in the command line and in the corpus.
        write: writes a sample of our own writers into an empty directory, and returns the file to change.
        load: reads everything of the sample; raises for a result that is wrong.
        mutators: change the file.
        refusals: errors by which the reader may refuse.
        install: puts a changed file in its place, with whatever must agree with it (a checksum, a size).
    """

    name: str
    write: Callable[[Path], Path]
    load: Callable[[Path], object]
    mutators: tuple[Mutator, ...] = (change_bytes,)
    refusals: tuple[type[Exception], ...] = (CheckpointError,)
    install: Callable[[Path, bytes], None] = lambda file, data: file.write_bytes(data) and None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of one input.

    Attributes:
        fault: true for all but a right result and a right refusal.
        told: the refusal or the fault, in words; "loads" for a result.
        place: where it came from: inputs that reach a new place are mutated further.
    """

    fault: bool
    told: str
    place: str


class Hang(BaseException):
    """An input that takes too long: no `Exception`, so that no reader takes it for damage."""


class Sample:
    """A target's sample on disk, into which changed files are put."""

    def __init__(self, target: Target, directory: Path):
        self.target, self.directory = target, directory
        self.file = target.write(directory)
        self.original = self.file.read_bytes()

    def warm(self) -> None:
        """Load the sample without an alarm: imports and compilation do not count as an input's time."""
        with suppress(*self.target.refusals):
            self.target.load(self.directory)

    def judge(self, data: bytes) -> Verdict:
        """Load one input and return the verdict."""
        canary.calls.clear()
        self.target.install(self.file, data)
        try:
            with _time_limit(SECONDS_PER_INPUT), _watched():
                self.target.load(self.directory)
            verdict = Verdict(False, "loads", "loads")
        except (Exception, Hang) as error:
            verdict = self._of(error)
        if canary.calls:
            return Verdict(True, f"executed: {', '.join(sorted(set(canary.calls)))}", "executed")
        return verdict

    def _of(self, error: BaseException) -> Verdict:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if any(p in f.filename for p in PACKAGES)
        ]
        place = f"{type(error).__name__} at " + (
            f"{_short(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
        )
        told = str(error)
        if any(isinstance(cause, MemoryError) for cause in _chain(error)):
            return Verdict(
                True, f"asks for more memory than a file of its size needs: {told[:500]}", f"memory {place}"
            )
        if not isinstance(error, self.target.refusals):
            return Verdict(True, f"{type(error).__name__}: {told[:500]}", place)
        if str(self.directory) not in told and str(self.file) not in told:
            return Verdict(True, f"names no file: {told[:500]}", f"unnamed {place}")
        try:
            told.encode()
        except UnicodeEncodeError:
            return Verdict(True, f"cannot be printed: {told[:500]!r}", f"unprintable {place}")
        if len(told) > 5000:
            return Verdict(True, f"a message of {len(told)} characters: {told[:500]}", f"long {place}")
        return Verdict(False, told, f"{place} from {_cause(error)}")


def mutate(target: Target, data: bytes, rng: random.Random) -> bytes:
    """Return a changed file: one change mostly, sometimes several."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(target.mutators)(data, rng)
    return data


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> str:
    cause = error.__cause__
    return f"{type(cause).__name__} {''.join(c for c in str(cause)[:40] if c.isalpha())}" if cause else ""


def _short(path: str) -> str:
    return next(path[path.rindex(package) + 1 :] for package in PACKAGES if package in path)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_watching = False


def _audit(event: str, args: tuple[object, ...]) -> None:
    executes = event == "pickle.find_class" and args[-2] in _EXECUTES
    if _watching and (executes or event.startswith(_FORBIDDEN)):
        canary.calls.append(f"{event} {args!r:.100}")


@contextmanager
def _watched() -> Iterator[None]:
    global _watching  # noqa: PLW0603  (an audit hook cannot be removed)
    if not hasattr(sys, "_qmoe_fuzz_audit"):
        sys.addaudithook(_audit)
        sys._qmoe_fuzz_audit = True  # type: ignore[attr-defined]
    _watching = True
    try:
        yield
    finally:
        _watching = False
