"""Opening a dense checkpoint of any format, which its own files tell."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qmoe_jax.checkpoints.huggingface.reader import open_huggingface
from qmoe_jax.checkpoints.huggingface.weights import WEIGHT_FILES
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.t5x.reader import open_t5x
from qmoe_jax.checkpoints.upstream.reader import DENSE_FILE, open_upstream
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        name: of the format; the opened checkpoint's `format`.
        looks_for: the files that tell the format, for the error where there is none of any.
        open: returns the checkpoint at a location, or None where none of the format lies. It decodes each
            index once, and raises `CheckpointError` for one that is damaged.
    """

    name: str
    looks_for: str
    open: Callable[[Location], Checkpoint | None]


FORMATS: tuple[Format, ...] = (
    Format("upstream", DENSE_FILE, open_upstream),
    Format("huggingface", " or ".join(WEIGHT_FILES), open_huggingface),
    Format("t5x", "checkpoint, checkpoint_<step>/checkpoint or _METADATA", open_t5x),
)
"""The dense formats, in the order in which they are looked for."""


def open_dense(path: str | os.PathLike[str], *, check: bool = True) -> Checkpoint:
    """Open a dense checkpoint: `open_format` with `FORMATS`."""
    return open_format(path, FORMATS, check=check)


def open_format(path: str | os.PathLike[str], formats: Sequence[Format], *, check: bool = True) -> Checkpoint:
    """Open the checkpoint at a path in the first of `formats` that it has.

    Args:
        path: a local path or, for T5X, a URL.
        formats: the formats to look for.
        check: look at every file first (present, not cut short), so that a damaged checkpoint is refused
            before any long work. Otherwise damage shows in `Checkpoint.shards` and when a tensor is read.

    Raises:
        CheckpointError: nothing is there, nothing of these formats (the error lists what was looked for), or
            what is there is damaged or not a Switch Transformer.
    """
    location = Location.of(path)
    for form in formats:
        checkpoint = form.open(location)
        if checkpoint is not None:
            if check:
                checkpoint.require_whole()
            return checkpoint
    there = not isinstance(location.path, Path) or location.path.exists()
    raise CheckpointError(
        "no checkpoint of a known format" if there else "no such file or directory",
        path=path,
        expected="; ".join(f"{form.name}: {form.looks_for}" for form in formats),
        found=_listing(location.path) if there else None,
    )


def _listing(path: Path | str) -> str:
    if not isinstance(path, Path):
        return "none of these at the URL"
    if not path.is_dir():
        return f"a file of {path.stat().st_size:,} bytes"
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "an empty directory"
