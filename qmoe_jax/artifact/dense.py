"""Dense parameters: written by Orbax, read by TensorStore.

Orbax keeps the tree as one OCDBT store (few files, however many arrays) of zarr arrays named by their path
joined with dots; `orbax.checkpoint` reads the directory like any other of its own.
"""

from __future__ import annotations

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
from qmoe_jax.files.finite import require_finite
from qmoe_jax.files.tensor import LazyTensor, read_all

DENSE = "dense"

CHUNK_BYTES = 1 << 24
"""Size of a zarr chunk in bytes, which a read decodes at a time on each core: small beside the largest array
(c-2048's embedding has 267 MB in float32), large enough to stream."""


def save_dense(root: Path, tree: Mapping[str, Any]) -> dict[str, ArrayRecord]:
    """Write the parameters under `root`/dense, replacing what is there.

    Memory: the whole tree, which the caller holds, and the compressed chunks of all arrays, which Orbax holds
    until they are written. With several hosts, all of them call this, and Orbax has the first one write.

    Returns:
        Shape, dtype and checksum of each array.
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
    """Remove what Orbax had half-written when a run was killed."""
    for folder in root.glob(f"{DENSE}.orbax-checkpoint-tmp*"):
        shutil.rmtree(folder)


def dense_tensor(root: Path, name: str, record: ArrayRecord) -> LazyTensor:
    """Return one array of an artifact's Orbax checkpoint, which is opened only when it is read.

    Args:
        root: the artifact.
        name: path of the parameter.
        record: its shape and dtype according to the manifest.
    """
    dtype = np.dtype(record.dtype)  # ml_dtypes has registered bfloat16

    def read(rows: slice) -> np.ndarray:
        base = {"driver": "file", "path": os.path.abspath(root / DENSE) + "/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
        try:
            store = ts.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True).result()
            if (store.shape, store.dtype.numpy_dtype) != (record.shape, dtype):
                found = f"{store.dtype.name} {store.shape}"
                raise _unreadable(root, name, f"{record.dtype} {record.shape}", found)
            return (store[rows] if record.shape else store).read().result()
        except (ValueError, OSError) as error:  # missing, truncated, or not what TensorStore's checksums say
            raise _unreadable(root, name, None, str(error).split("\n", 1)[0]) from error

    return LazyTensor(record.shape, dtype, read)


def stored_record(root: Path, name: str, record: ArrayRecord) -> ArrayRecord:
    """Return shape, dtype and checksum of an array as it lies on disk.

    Raises:
        CheckpointError: it cannot be read, has another shape or dtype than `record`, or holds a number that
            is not finite.
    """
    array = read_all(dense_tensor(root, name, record))
    return _record_of(require_finite(array, path=root / DENSE, key=name))


def _unreadable(root: Path, name: str, expected: str | None, found: str) -> CheckpointError:
    return CheckpointError(
        "a dense parameter cannot be read",
        path=root / DENSE,
        key=name,
        expected=expected,
        found=found,
        remedy="copy the artifact again",
    )


def _record_of(array: np.ndarray) -> ArrayRecord:
    """Return shape, dtype and checksum of an array."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    sha256 = hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()
    return ArrayRecord(tuple(array.shape), array.dtype.name, sha256)
