"""Opens a model in any format: our own artifact, or one of the dense checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

from qmoe_jax.artifact.manifest import MANIFEST, RUN
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.open import open_dense
from qmoe_jax.checkpoints.reader import DenseReader


def open_checkpoint(path: str | os.PathLike[str] | DenseReader, *, check: bool = True) -> DenseReader:
    """Open what lies at a path: an artifact (an `ArtifactReader`), or a checkpoint of any known format.

    A checkpoint that is already opened is returned as it is, so that functions can take either.
    With `check` every file is looked at first (present, not cut short); else damage shows later.

    Raises:
      CheckpointError: nothing is there, nothing of a known format (the error says what was looked for),
        something damaged, or (an `CheckpointError`) an artifact that is unfinished.
    """
    if isinstance(path, DenseReader):
        return path
    if not is_artifact(path):
        return open_dense(path, check=check)
    reader = ArtifactReader.open(Path(path))
    if check:
        reader.require_whole()
    return reader


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether an artifact lies at a path, finished or not."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, RUN))
