"""The dense parameters: written by Orbax, read by tensorstore, in parts and cast on the way.

Orbax keeps the tree as one OCDBT store (few files, however many arrays) of zarr arrays named by their path
joined with dots; `orbax.checkpoint` reads the directory like any other of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util

from qmoe_jax.artifact.manifest import ArrayRecord
from qmoe_jax.files.durable import sync_folder
from qmoe_jax.files.errors import CheckpointError

DENSE = "dense"

CHUNK_BYTES = 1 << 24
"""Bytes of a zarr chunk, which is what a read decodes at a time on each core: small beside the largest array
(c-2048's embedding has 267 MB in float32), large enough to stream."""


def save_dense(root: Path, tree: Mapping[str, Any]) -> dict[str, ArrayRecord]:
    """Writes the parameters under `root`/dense, replacing what is there; returns what each array must be.

    Memory: Orbax holds the compressed chunks of what it is writing, beside the tree itself. With several
      hosts,
    all of them call this, and Orbax has the first one write.
    """
    import orbax.checkpoint as ocp

    path = root / DENSE
    host_tree = jax.tree.map(np.asarray, dict(tree))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), host_tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        checkpointer.save(os.path.abspath(path), args=ocp.args.PyTreeSave(host_tree, save_args), force=True)
    for folder in (path, *(found for found in path.rglob("*") if found.is_dir())):
        sync_folder(folder)
    sync_folder(root)
    arrays = traverse_util.flatten_dict(host_tree, sep="/")
    return {name: _record_of(array) for name, array in arrays.items()}


def remove_leftovers(root: Path) -> None:
    """Removes what Orbax had half-written when a run was killed."""
    for folder in root.glob(f"{DENSE}.orbax-checkpoint-tmp*"):
        shutil.rmtree(folder)


@dataclasses.dataclass(frozen=True)
class DenseTensor:
    """One array of an artifact's Orbax checkpoint; opened only when it is read."""

    root: Path
    name: str
    record: ArrayRecord

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the manifest gives."""
        return self.record.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype that the manifest gives (`ml_dtypes.bfloat16` among them)."""
        return np.dtype(self.record.dtype)

    def read(self, rows: slice) -> np.ndarray:
        """Rows `rows` of the first axis (a scalar: everything), in the stored dtype."""
        return self._read(rows, self.dtype)

    def read_as(self, dtype: np.dtype) -> np.ndarray:
        """All of it, cast chunk by chunk as it is read: never whole in two dtypes."""
        return self._read(slice(None), dtype)

    def content(self) -> ArrayRecord:
        """What the array on the disk is found to be. Raises `CheckpointError` where it cannot be read."""
        return _record_of(self.read(slice(None)))

    def _read(self, rows: slice, dtype: np.dtype) -> np.ndarray:
        base = {"driver": "file", "path": os.path.abspath(self.root / DENSE) + "/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": self.name.replace("/", ".") + "/"}
        try:
            store = ts.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True).result()
            if (store.shape, store.dtype.numpy_dtype) != (self.shape, self.dtype):
                found = f"{store.dtype.name} {store.shape}"
                raise self._error(f"{self.record.dtype} {self.shape}", found)
            store = store[rows] if self.shape else store
            return ts.cast(store, dtype).read().result()
        except (
            ValueError,
            OSError,
        ) as error:  # tensorstore: missing, truncated, or not what its checksums say
            raise self._error(None, str(error).split("\n", 1)[0]) from error

    def _error(self, expected: str | None, found: str) -> CheckpointError:
        return CheckpointError(
            "a dense parameter cannot be read",
            path=self.root / DENSE,
            key=self.name,
            expected=expected,
            found=found,
            remedy="copy the artifact again",
        )


def _record_of(array: np.ndarray) -> ArrayRecord:
    """Shape, dtype and checksum of an array."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    sha256 = hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()
    return ArrayRecord(tuple(array.shape), array.dtype.name, sha256)
