"""Opens a dense checkpoint of any format, found by the files that lie there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from qmoe_jax.checkpoints.huggingface.reader import open_huggingface
from qmoe_jax.checkpoints.huggingface.weights import WEIGHT_FILES, find_weights
from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.checkpoints.t5x.reader import find_t5x, open_t5x
from qmoe_jax.checkpoints.upstream.reader import DENSE_FILE, open_upstream
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format: what is looked for at a location, whether it is there, how to open it."""

    name: str
    looks_for: str
    recognizes: Callable[[Location], bool]
    open: Callable[[str | os.PathLike[str]], DenseReader]


def _has_huggingface(location: Location) -> bool:
    return isinstance(location.path, Path) and find_weights(location.path) is not None


def _has_upstream(location: Location) -> bool:
    return isinstance(location.path, Path) and (location.path / DENSE_FILE).is_file()


def _has_t5x(location: Location) -> bool:
    return find_t5x(location) is not None


FORMATS: tuple[Format, ...] = (
    Format("upstream", DENSE_FILE, _has_upstream, open_upstream),
    Format("huggingface", " or ".join(WEIGHT_FILES), _has_huggingface, open_huggingface),
    Format("t5x", "checkpoint, checkpoint_<step>/checkpoint or _METADATA", _has_t5x, open_t5x),
)
"""In the order in which they are looked for; the first that is recognized opens the path."""


def open_dense(path: str | os.PathLike[str], *, check: bool = True) -> DenseReader:
    """The checkpoint at a local path or, for T5X, a URL, with its format told by its own files.

    With `check` every file is looked at first (present, not cut short), so that a damaged checkpoint is
    refused before any long work; without, damage shows in `DenseReader.shards` and when a tensor is read.

    Raises:
        CheckpointError: nothing is there, or nothing of a known format (the error says what was looked for),
            or what is there is damaged or no Switch Transformer.
    """
    location = Location.of(path)
    for form in FORMATS:
        if form.recognizes(location):
            reader = form.open(path)
            if check:
                reader.require_whole()
            return reader
    there = not isinstance(location.path, Path) or location.path.exists()
    raise CheckpointError(
        "no checkpoint of a known format" if there else "no such file or directory",
        path=path,
        expected="; ".join(f"{form.name}: {form.looks_for}" for form in FORMATS),
        found=_listing(location.path) if there else None,
    )


def _listing(path: Path | str) -> str:
    if not isinstance(path, Path):
        return "none of these behind the URL"
    if not path.is_dir():
        return f"a file of {path.stat().st_size:,} bytes"
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "an empty directory"
