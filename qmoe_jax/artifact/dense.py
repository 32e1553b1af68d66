"""Dense parameters: written by Orbax, read by TensorStore.

Orbax keeps the tree as one OCDBT store (few files, however many arrays) of zarr arrays named by their path
joined with dots; `orbax.checkpoint` reads the directory like any other of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util

from qmoe_jax.artifact.manifest import ArrayRecord
from qmoe_jax.files.durable import sync_folder
from qmoe_jax.files.errors import CheckpointError, error_number, system_error
from qmoe_jax.files.finite import require_finite
from qmoe_jax.files.location import tensorstore_path
from qmoe_jax.files.space import require_room
from qmoe_jax.files.store import Store
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

    Raises:
        CheckpointError: the disk is full, or refuses otherwise.
    """
    import orbax.checkpoint as ocp

    path = root / DENSE
    host_tree = jax.tree.map(np.asarray, dict(tree))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), host_tree)
    # Orbax's threads go on writing after a failure, and print tracebacks when its event loop is closed.
    require_room(root, sum(array.nbytes for array in jax.tree.leaves(host_tree)), wanted=path)
    place = os.path.join(tensorstore_path(root), DENSE)
    try:
        with (
            _quiet_orbax(),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer,
        ):
            checkpointer.save(place, args=ocp.args.PyTreeSave(host_tree, save_args), force=True)
    except (OSError, ValueError, RuntimeError) as error:
        if error_number(error) is None:
            raise
        with contextlib.suppress(OSError):
            remove_leftovers(root)
        raise system_error("the dense parameters cannot be written", path, error) from error
    for folder in (path, *(found for found in path.rglob("*") if found.is_dir())):
        sync_folder(folder)
    sync_folder(root)
    arrays = traverse_util.flatten_dict(host_tree, sep="/")
    return {name: _record_of(array) for name, array in arrays.items()}


def save_dense_in(store: Store, tree: Mapping[str, Any]) -> dict[str, ArrayRecord]:
    """Write the parameters under `dense` of a store, by way of a temporary folder where it is not local."""
    if isinstance(store.root, Path):
        return save_dense(store.root, tree)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        records = save_dense(root, tree)
        store.delete_folder(DENSE)
        for file in sorted(path for path in (root / DENSE).rglob("*") if path.is_file()):
            store.write(file.relative_to(root).as_posix(), [file.read_bytes()])
    return records


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep Orbax's threads from logging the traceback of an error that is raised as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def remove_leftovers(root: Path) -> None:
    """Remove what Orbax had half-written when a run was killed."""
    for folder in root.glob(f"{DENSE}.orbax-checkpoint-tmp*"):
        shutil.rmtree(folder)


def dense_tensor(store: Store, name: str, record: ArrayRecord) -> LazyTensor:
    """Return one array of an artifact's Orbax checkpoint, which is opened only when it is read.

    Args:
        store: the artifact.
        name: path of the parameter.
        record: its shape and dtype according to the manifest.
    """
    dtype = np.dtype(record.dtype)  # ml_dtypes has registered bfloat16

    def read(rows: slice) -> np.ndarray:
        spec = store.spec
        base = {**spec, "path": f"{spec['path']}{DENSE}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
        try:
            array = ts.open(
                {"driver": "zarr", "kvstore": kvstore}, read=True, open=True, context=store.context
            ).result()
            if (array.shape, array.dtype.numpy_dtype) != (record.shape, dtype):
                found = f"{array.dtype.name} {array.shape}"
                raise _unreadable(store, name, f"{record.dtype} {record.shape}", found)
            return (array[rows] if record.shape else array).read().result()
        except (ValueError, OSError) as error:  # missing, truncated, or not what TensorStore's checksums say
            raise _unreadable(store, name, None, str(error).split("\n", 1)[0]) from error

    return LazyTensor(record.shape, dtype, read)


def stored_record(store: Store, name: str, record: ArrayRecord) -> ArrayRecord:
    """Return shape, dtype and checksum of an array as it lies on disk.

    Raises:
        CheckpointError: it cannot be read, has another shape or dtype than `record`, or holds a number that
            is not finite.
    """
    array = read_all(dense_tensor(store, name, record))
    return _record_of(require_finite(array, path=store.path(DENSE), key=name))


def _unreadable(store: Store, name: str, expected: str | None, found: str) -> CheckpointError:
    return CheckpointError(
        "a dense parameter cannot be read",
        path=store.path(DENSE),
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
