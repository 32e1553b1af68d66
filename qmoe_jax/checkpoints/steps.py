"""Steps of a training run: the newest that is whole, and directories that a writer has not finished."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location, Unreadable

# T5X's checkpoint_1000, Orbax's 1000 and step_1000, the Trainer's checkpoint-500 of `transformers`.
_STEP = re.compile(r"(?:(?:checkpoint|ckpt|step)[_-])?([0-9]+)")
# Names until a step is complete: T5X's (and ours), Orbax's, the Trainer's.
_TEMPORARY = re.compile(
    r"(checkpoint_[0-9]+)\.tmp-.*|(.+)\.orbax-checkpoint-tmp(?:-.*)?|tmp-(checkpoint-[0-9]+)"
)
_COMMITTED = "commit_success.txt"
"""Orbax's mark of a finished step on file systems that cannot rename directories."""


def is_step(name: str) -> bool:
    """Return whether a directory is named as one step of a run."""
    return _STEP.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Return whether a directory is named as a step that is being written."""
    return _TEMPORARY.fullmatch(name) is not None


def require_finished(location: Location) -> None:
    """Raise `CheckpointError` if a directory, or one above it, has the name of an unfinished step."""
    parts = location.path.parts if isinstance(location.path, Path) else location.path.split("/")
    for name in parts:
        if match := _TEMPORARY.fullmatch(name):
            raise CheckpointError(
                "is an unfinished step: its writer was interrupted, or still writes",
                path=location.path,
                expected=f"{next(filter(None, match.groups()))}, its name once it is complete",
                found=name,
                remedy="name another step, or the directory of the run, whose newest whole step is read",
            )


def step_names(location: Location) -> list[str]:
    """Return the names of the steps in the directory of a run, the newest first."""
    matches = (_STEP.fullmatch(name) for name in location.directories())
    return [match[0] for match in sorted(filter(None, matches), key=lambda match: (-int(match[1]), match[0]))]


def open_newest(
    location: Location, open_step: Callable[[Location], Checkpoint | None], *, check: bool
) -> tuple[Checkpoint, list[str]] | None:
    """Open the newest step of a run that is whole, and return it with a note if newer ones are not.

    Args:
        location: the directory of the run.
        open_step: opens the directory of a step; None where no checkpoint lies there.
        check: if no step is whole, raise an error; otherwise return the newest that can be opened.

    Returns:
        None if the directory has no steps.

    Raises:
        CheckpointError: no step is whole; names what is wrong with each. Of a single step it is its own.
        Unreadable: a file cannot be read, so that the step may well be whole.
    """
    names = step_names(location)
    committed = {name for name in names if (location / name).read(_COMMITTED) is not None}
    faults: dict[str, CheckpointError] = {}
    damaged: Checkpoint | None = None
    for name in names:
        try:
            if committed and name not in committed:
                raise _unfinished(location / name, f"no {_COMMITTED}, which other steps have")
            checkpoint = open_step(location / name)
            if checkpoint is None:
                raise _unfinished(location / name, contents(location / name))
            damaged = damaged or checkpoint
            checkpoint.require_whole()
        except Unreadable:
            raise
        except CheckpointError as error:
            faults[name] = error
            continue
        return checkpoint, [f"{name} is read, newer steps are skipped: {_told(faults)}"] if faults else []
    if not faults:
        return None
    if damaged is not None and not check:
        return damaged, [f"no step is whole: {_told(faults)}"]
    if len(faults) == 1:
        raise next(iter(faults.values()))
    raise CheckpointError(
        "no step is whole",
        path=location.path,
        found=_told(faults),
        remedy="copy the newest step again",
    )


def _told(faults: dict[str, CheckpointError]) -> str:
    """Return what is wrong with steps, the first three in words."""
    told = [
        f"{name}: {error.problem}" + (f" ({error.found})" if error.found is not None else "")
        for name, error in list(faults.items())[:3]
    ]
    return "; ".join(told + ([f"{len(faults) - 3} more"] if len(faults) > 3 else []))


def _unfinished(location: Location, found: str) -> CheckpointError:
    return CheckpointError(
        "is an unfinished step",
        path=location.path,
        expected="an index: checkpoint, _METADATA or weights",
        found=found,
        remedy="name the directory of the run, whose newest whole step is read",
    )


def unfinished_step(location: Location) -> CheckpointError | None:
    """Return the error for a directory that is named as a step and holds no checkpoint; None for another."""
    name = location.path.absolute().name if isinstance(location.path, Path) else location.name
    if not is_step(name) or (isinstance(location.path, Path) and not location.path.is_dir()):
        return None
    return _unfinished(location, contents(location))


def contents(location: Location) -> str:
    """Return the first names in a directory, in words."""
    path = location.path
    if not isinstance(path, Path):
        return "none of these at the URL"
    if not path.is_dir():
        return f"a file of {path.stat().st_size:,} bytes"
    entries = sorted(path.iterdir())
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    dangling = " (a link to nothing)"
    shown = [entry.name + ("" if entry.exists() else dangling) for entry in entries[:5]]
    return ", ".join(shown) + more if entries else "an empty directory"
