"""The hidden files that a run keeps beside its artifact, which a killed run leaves behind."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.staging import staged

STAGING = ".staging"

HIDDEN_STATES = ".hidden-states.*"
"""Pattern of the files that `HiddenStates` maps; they have a name only for a moment."""


def remove_scratch(root: Path) -> None:
    """Remove what a killed run left behind; finished groups and their records are kept."""
    shutil.rmtree(root / STAGING, ignore_errors=True)
    for path in root.glob(HIDDEN_STATES):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_beside(root: Path, reader: Checkpoint, reads: Iterable[tuple[str, range]]) -> Iterator[Checkpoint]:
    """Yield the reader with chunks that span many experts read once, through scratch files below `root`."""
    scratch = root / STAGING
    scratch.mkdir()
    try:
        with staged(reader, scratch, reads) as staged_reader:
            yield staged_reader
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
