"""Opening of a model in any format: our own artifact, or one of the dense checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

from qmoe_jax import checkpoints
from qmoe_jax.artifact.manifest import MANIFEST, REPORT, RUN
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.open import Format, open_format
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.location import Location, local_path
from qmoe_jax.settings import own_settings


def artifact_root(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of the artifact at a path or file URL, finished or not; None where there is none.

    The path is that directory, or the manifest or run in it.
    """
    root = local_path(path)
    if root is not None and root.name in (MANIFEST, RUN) and root.is_file():
        return root.parent
    return root if root is not None and any((root / name).is_file() for name in (MANIFEST, RUN)) else None


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Return whether an artifact lies at a path or file URL, finished or not."""
    return artifact_root(path) is not None


def _open_artifact(location: Location, file: str | None) -> ArtifactReader | None:
    local = isinstance(location.path, Path) and is_artifact(location.path)
    return ArtifactReader.open(location.path) if local else None


FORMATS = (
    Format("qmoe", (MANIFEST, RUN), _open_artifact, (REPORT, "SHA256SUMS", "codebooks.safetensors")),
    *checkpoints.FORMATS,
)
"""Every format, in the order in which they are looked for."""


@own_settings()
def open_checkpoint(path: str | os.PathLike[str] | Checkpoint, *, check: bool = True) -> Checkpoint:
    """Open what lies at a path: an artifact (an `ArtifactReader`), or a checkpoint of any known format.

    Args:
        path: a local path, a file URL or, for T5X, another URL. An opened checkpoint is returned as it is.
        check: look at every file first (present, not cut short); otherwise damage shows later.

    Raises:
        CheckpointError: nothing is there, nothing of a known format (the error lists what was looked for),
            something damaged, or an artifact that is unfinished.
    """
    return path if isinstance(path, Checkpoint) else open_format(path, FORMATS, check=check)
