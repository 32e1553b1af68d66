"""Opening a dense checkpoint of any format, which its own files tell."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qmoe_jax.checkpoints.huggingface.reader import open_huggingface
from qmoe_jax.checkpoints.huggingface.weights import WEIGHT_FILES
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.steps import (
    contents,
    is_step,
    is_temporary,
    open_newest,
    require_finished,
    step_names,
    unfinished_step,
)
from qmoe_jax.checkpoints.t5x.reader import INDEX_FILES, open_t5x
from qmoe_jax.checkpoints.upstream.reader import DENSE_FILE, open_upstream
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.location import Location
from qmoe_jax.files.names import similar


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        name: of the format; the opened checkpoint's `format`.
        index_files: the files that tell the format.
        open: returns the checkpoint in a directory, or None where none of the format lies. It decodes each
            index once, and raises `CheckpointError` for one that is damaged. Its second argument is the file
            by which the checkpoint was named, if any.
        other_files: patterns of other files in its directories that a checkpoint may be named by.
    """

    name: str
    index_files: tuple[str, ...]
    open: Callable[[Location, str | None], Checkpoint | None]
    other_files: tuple[str, ...] = ()

    def has(self, file: str) -> bool:
        """Return whether a checkpoint of this format may be named by `file`."""
        return any(fnmatch.fnmatchcase(file, pattern) for pattern in (*self.index_files, *self.other_files))


FORMATS: tuple[Format, ...] = (
    Format("upstream", (DENSE_FILE,), open_upstream, ("config.json", "sizes.pt", "exp*.pt")),
    Format("huggingface", WEIGHT_FILES, open_huggingface, ("config.json", "*.safetensors", "*.bin")),
    Format("t5x", INDEX_FILES, open_t5x),
)
"""The dense formats, in the order in which they are looked for."""


def open_dense(path: str | os.PathLike[str], *, check: bool = True) -> Checkpoint:
    """Open a dense checkpoint: `open_format` with `FORMATS`."""
    return open_format(path, FORMATS, check=check)


def open_format(path: str | os.PathLike[str], formats: Sequence[Format], *, check: bool = True) -> Checkpoint:
    """Open the checkpoint at a path in the first of `formats` that it has.

    Args:
        path: a directory, one of the files in it that tell the format, or the directory of a run, whose
            newest whole step is opened; a local path, a file URL or, for T5X, another URL.
        formats: the formats to look for.
        check: look at every file first (present, not cut short), so that a damaged checkpoint is refused
            before any long work. Otherwise damage shows in `Checkpoint.shards` and when a tensor is read.

    Raises:
        CheckpointError: nothing is there, nothing of these formats (the error lists what was looked for), or
            what is there is damaged, an unfinished step or not a Switch Transformer.
    """
    location = Location.of(path)
    require_finished(location)
    directory, file = _split(location, formats)
    if (checkpoint := _open(directory, file, formats)) is not None:
        if check:
            checkpoint.require_whole()
        return checkpoint
    if file is None and (
        newest := open_newest(location, lambda step: _open(step, None, formats), check=check)
    ):
        return _with_notes(*newest)
    raise _nothing(path, location, file, formats)


def _split(location: Location, formats: Sequence[Format]) -> tuple[Location, str | None]:
    """Return the checkpoint's directory, and the file by which it was named, if it was."""
    if isinstance(location.path, Path):
        named = location.path.is_file()
    else:
        named = any(location.name in form.index_files for form in formats)
    return (location.parent, location.name) if named else (location, None)


def _open(directory: Location, file: str | None, formats: Sequence[Format]) -> Checkpoint | None:
    # A file of an unknown name can only be T5X's or Flax's msgpack, which may have any.
    able = [form for form in formats if file is None or form.has(file)] or formats[-1:]
    for form in able:
        if checkpoint := form.open(directory, file):
            return _with_notes(checkpoint, _others(directory, form, formats) if file is None else [])
    return None


def _others(directory: Location, chosen: Format, formats: Sequence[Format]) -> list[str]:
    """Return a note on each checkpoint of another format in a local directory."""
    if not isinstance(path := directory.path, Path):
        return []
    others = [name for form in formats if form is not chosen for name in form.index_files]
    there = [name for name in others if (path / name).is_file()]
    there += [] if is_step(path.absolute().name) else step_names(directory)[:1]
    told = f"other checkpoints lie beside this one of format {chosen.name}; to read one, name it: "
    return [told + ", ".join(there)] if there else []


def _with_notes(checkpoint: Checkpoint, notes: list[str]) -> Checkpoint:
    return dataclasses.replace(checkpoint, notes=[*notes, *checkpoint.notes]) if notes else checkpoint


def _nothing(
    path: str | os.PathLike[str], location: Location, file: str | None, formats: Sequence[Format]
) -> CheckpointError:
    """Return the error for a path without a checkpoint."""
    if file is not None and (known := foreign_error(location.path)):
        return known
    if file is None and (unfinished := unfinished_step(location)):
        return unfinished
    if file is None and (temporary := next(filter(is_temporary, location.directories()), None)):
        return CheckpointError(
            "no finished step",
            path=path,
            expected="checkpoint_<step>, or another step's directory",
            found=f"{temporary}, whose writer was interrupted or still writes",
        )
    there = not isinstance(location.path, Path) or os.path.lexists(location.path)
    directory = location.parent if file is not None else location
    looked_for = "; ".join(f"{form.name}: {' or '.join(form.index_files)}" for form in formats)
    return CheckpointError(
        "no checkpoint of a known format" if there else "no such file or directory",
        path=path,
        expected=f"{looked_for}; or steps such as checkpoint_<step>",
        found=contents(directory) if there else None,
        remedy=_near_miss(directory, formats),
    )


def _near_miss(directory: Location, formats: Sequence[Format]) -> str | None:
    """Return what to do about a file that nearly has the name of an index file."""
    if not isinstance(path := directory.path, Path) or not path.is_dir():
        return None
    for name in (name for form in formats for name in form.index_files):
        if other := similar(path, name):
            return f"rename {other} to {name}" if other.lower() == name.lower() else f"complete {other}"
    return None
