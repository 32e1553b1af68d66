"""Opening of a model in any format: our own artifact, or one of the dense checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

from qmoe_jax import checkpoints
from qmoe_jax.artifact.manifest import MANIFEST, REPORT, RUN
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.open import Format, open_format
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.location import Location, Unreadable
from qmoe_jax.files.store import Store, open_store
from qmoe_jax.settings import own_settings


def artifact_root(path: str | os.PathLike[str]) -> Path | str | None:
    """Return the directory or URL of the artifact at a path or URL, finished or not; None without one.

    The path is that directory, or the manifest or run in it.

    Raises:
        CheckpointError: the URL cannot be read.
    """
    location = Location.of(path)
    if location.name in (MANIFEST, RUN) and open_store(location.parent.path).exists(location.name):
        location = location.parent
    return location.path if _has_artifact(open_store(location.path)) else None


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Return whether an artifact lies at a path or URL, finished or not. Raises as `artifact_root` does."""
    return artifact_root(path) is not None


def _has_artifact(store: Store) -> bool:
    try:
        return any(map(store.exists, (MANIFEST, RUN)))
    except Unreadable as error:
        # So a server answers for what is not there, where it lets nobody list. Other formats are tried then.
        if "PERMISSION_DENIED" in str(error.found):
            return False
        raise


def _open_artifact(location: Location, file: str | None) -> ArtifactReader | None:
    store = open_store(location.path)
    return ArtifactReader.open(store) if _has_artifact(store) else None


FORMATS = (
    Format("qmoe", (MANIFEST, RUN), _open_artifact, (REPORT, "SHA256SUMS", "codebooks.safetensors")),
    *checkpoints.FORMATS,
)
"""Every format, in the order in which they are looked for."""


@own_settings()
def open_checkpoint(path: str | os.PathLike[str] | Checkpoint, *, check: bool = True) -> Checkpoint:
    """Open what lies at a path: an artifact (an `ArtifactReader`), or a checkpoint of any known format.

    Args:
        path: a local path or, for artifacts and T5X, a URL. An opened checkpoint is returned as it is.
        check: look at every file first (present, not cut short); otherwise damage shows later.

    Raises:
        CheckpointError: nothing is there, nothing of a known format (the error lists what was looked for),
            something damaged, or an artifact that is unfinished.
    """
    return path if isinstance(path, Checkpoint) else open_format(path, FORMATS, check=check)
