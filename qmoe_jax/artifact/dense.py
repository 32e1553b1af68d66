"""Dense parameters, streamed into a database that Orbax and TensorStore read, and out of it.

They lie in one OCDBT database (few files, however many arrays) of zarr arrays named by their path joined with
dots, with the metadata by which `orbax.checkpoint` restores the directory like one of its own. Orbax itself
would hold the whole tree while it writes, which for a skipped stack of c-2048 is terabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from qmoe_jax.artifact.manifest import ArrayRecord
from qmoe_jax.files.durable import sync_folder
from qmoe_jax.files.errors import CheckpointError, error_number, system_error
from qmoe_jax.files.finite import require_finite
from qmoe_jax.files.location import driver_error
from qmoe_jax.files.space import require_room
from qmoe_jax.files.store import Store
from qmoe_jax.files.tensor import LazyTensor, Tensor, row_ranges
from qmoe_jax.parameters import is_expert

DENSE = "dense"

CHUNK_BYTES = 1 << 24
"""Size of a zarr chunk in bytes, which a read decodes at a time on each core: small beside the largest array
(c-2048's embedding has 267 MB in float32), large enough to stream."""

RANGE_BYTES = 1 << 27
"""Bytes of rows that are read, checked and written at a time (128 MiB): a transaction of the database and two
synced files each, so large enough that these cost little, and small beside a group of experts."""

METADATA = "_METADATA"
"""Orbax's description of the tree, written when all arrays are."""

_PARTIAL = f".{DENSE}.partial"
"""Folder that is renamed when it is complete."""

_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def save_dense(
    store: Store, tensors: Mapping[str, Tensor], *, source: object = None
) -> dict[str, ArrayRecord]:
    """Write parameters under `dense`, replacing what is there, in the order in which they are given.

    Locally the folder is whole or absent. In an object store the metadata without which Orbax restores
    nothing are written last. With several hosts, one calls this. Memory: two ranges of `RANGE_BYTES`, or
    of as many rows as a chunk spans where these are larger, and the compressed bytes of one.

    Args:
        store: the artifact.
        tensors: the parameters by path. Rows are read in order, and once.
        source: path of what they are read from, for errors.

    Returns:
        Shape, dtype and checksum of each array.

    Raises:
        CheckpointError: a number is not finite, or a tensor cannot be read; the disk is full, or the store
            refuses otherwise. Nothing lies there then, or in an object store what has no metadata.
    """
    local, path = isinstance(store.root, Path), store.path(DENSE)
    folder = _PARTIAL if local else DENSE
    if isinstance(store.root, Path):
        size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        require_room(store.root, size, wanted=path)
    store.delete_folder(folder)
    database = _Database(_below(store, folder), store.context, path)
    try:
        records = {
            name: database.write(name, tensor, path if source is None else source)
            for name, tensor in tensors.items()
        }
        database.commit()
        store.write(f"{folder}/_CHECKPOINT_METADATA", [_json({"item_handlers": _HANDLER, "metrics": {}})])
        store.write(f"{folder}/{METADATA}", [_json(_tree_metadata(list(tensors)))])
        if local:
            _put_in_place(Path(store.path(folder)), Path(path))
        else:  # Orbax looks for it where nothing can be renamed
            store.write(f"{folder}/commit_success.txt", [b"Checkpoint commit was successful."])
    except BaseException:
        with contextlib.suppress(CheckpointError):  # the error that is raised came first
            database.abandon()
        if local:
            store.delete_folder(folder)  # a full disk needs the room
        raise
    return records


class _Database:
    """The arrays under way into an OCDBT database: those of a transaction, and those being committed."""

    def __init__(self, base: dict[str, Any], context: ts.Context | None, path: object):
        """Write below the kvstore spec `base`; `path` is its name in errors."""
        # One context for all arrays: with one each, tensorstore has as many databases, whose commits collide.
        self._base, self._context, self._path = base, context or ts.Context(), path
        self._transaction, self._bytes = ts.Transaction(atomic=True), 0
        self._committing: ts.Future[None] | None = None

    def write(self, name: str, tensor: Tensor, source: object) -> ArrayRecord:
        """Read, check and write one array. Raises `CheckpointError`."""
        sha256 = hashlib.sha256()
        metadata = _zarr_metadata(tensor)
        if not math.prod(tensor.shape):
            self._open(name, metadata, create=True)
        for rows in row_ranges(tensor, RANGE_BYTES, multiple=(*metadata["chunks"], 1)[0]):
            array = tensor.read(rows)
            first = rows.start if is_expert(name) else None
            require_finite(array, path=source, key=name, first=first, row=rows.start)
            sha256.update(_little_endian(array))
            if self._bytes + array.nbytes > RANGE_BYTES:
                self._begin_commit()
            with self._refusing(name):
                stored = self._open(name, metadata, create=rows.start == 0)
                part = stored[rows.start : rows.stop] if tensor.shape else stored
                part.write(array, can_reference_source_data_indefinitely=True).copy.result()
            self._bytes += array.nbytes
            if self._bytes > RANGE_BYTES // 2:
                self._begin_commit()
        return ArrayRecord(tuple(tensor.shape), tensor.dtype.name, sha256.hexdigest())

    def commit(self) -> None:
        """Wait until all that was written is in the store."""
        self._begin_commit()
        self._end_commit()

    def abandon(self) -> None:
        """Wait for what is being written, and write no more. Raises what it met."""
        self._transaction.abort()
        self._end_commit()

    def _begin_commit(self) -> None:
        """Commit the transaction while the next is filled, after the one before it."""
        self._end_commit()
        self._committing = self._transaction.commit_async()
        self._transaction, self._bytes = ts.Transaction(atomic=True), 0

    def _end_commit(self) -> None:
        if self._committing is not None:
            with self._refusing():
                self._committing.result()

    def _open(self, name: str, metadata: dict[str, Any], *, create: bool) -> ts.TensorStore:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": self._base, "path": f"{name.replace('/', '.')}/"},
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
            # The transaction that creates the array need not be in the store yet.
            **({"create": True} if create else {"open": True, "assume_metadata": True}),
        }
        return ts.open(spec, write=True, context=self._context, transaction=self._transaction).result()

    @contextlib.contextmanager
    def _refusing(self, name: str | None = None) -> Iterator[None]:
        """Turn tensorstore's errors into `CheckpointError`."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            problem = "the dense parameters cannot be written"
            if error_number(error) is not None:
                raise system_error(problem, self._path, error, key=name) from error
            raise driver_error(problem, self._path, error, key=name) from error


def _zarr_metadata(tensor: Tensor) -> dict[str, Any]:
    """Return the .zarray of a tensor: chunks are of whole rows of its last axes where these fit."""
    chunks: list[int] = []
    left = CHUNK_BYTES // tensor.dtype.itemsize
    for size in reversed(tensor.shape):
        chunks.insert(0, max(1, min(size, left)))
        left //= chunks[0]
    bfloat16 = tensor.dtype.name == "bfloat16"
    return {
        "zarr_format": 2,
        "shape": list(tensor.shape),
        "chunks": chunks,
        "dtype": "bfloat16" if bfloat16 else tensor.dtype.newbyteorder("<").str,
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
        "fill_value": None,  # so a chunk that is missing was lost
        "filters": None,
        "order": "C",
    }


def _tree_metadata(names: Sequence[str]) -> dict[str, Any]:
    """Return Orbax's description of nested dicts with an array at each path."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    paths = [tuple(name.split("/")) for name in names]
    return {
        "tree_metadata": {
            str(path): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path],
                "value_metadata": value,
            }
            for path in paths
        },
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _put_in_place(folder: Path, place: Path) -> None:
    """Rename a complete folder; all names in it are durable then."""
    try:
        for found in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sync_folder(found)
        if place.exists():
            shutil.rmtree(place)
        folder.replace(place)
    except OSError as error:
        raise system_error("the dense parameters cannot be written", place, error) from error
    sync_folder(place.parent)


def remove_leftovers(store: Store) -> None:
    """Remove what a killed run had half-written."""
    store.delete_folder(_PARTIAL)


def dense_tensor(store: Store, name: str, record: ArrayRecord) -> LazyTensor:
    """Return one array of an artifact's Orbax checkpoint, which is opened only when it is read.

    Args:
        store: the artifact.
        name: path of the parameter.
        record: its shape and dtype according to the manifest.
    """
    dtype = np.dtype(record.dtype)  # ml_dtypes has registered bfloat16

    def read(rows: slice) -> np.ndarray:
        kvstore = {"driver": "ocdbt", "base": _below(store, DENSE), "path": name.replace("/", ".") + "/"}
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
    """Return shape, dtype and checksum of an array as it lies on disk. Memory: `RANGE_BYTES` of rows.

    Raises:
        CheckpointError: it cannot be read, has another shape or dtype than `record`, or holds a number that
            is not finite.
    """
    tensor = dense_tensor(store, name, record)
    sha256, multiple = hashlib.sha256(), (*_zarr_metadata(tensor)["chunks"], 1)[0]
    for rows in row_ranges(tensor, RANGE_BYTES, multiple):
        array = tensor.read(rows)
        first = rows.start if is_expert(name) else None
        require_finite(array, path=store.path(DENSE), key=name, first=first, row=rows.start)
        sha256.update(_little_endian(array))
    return ArrayRecord(tensor.shape, tensor.dtype.name, sha256.hexdigest())


def _below(store: Store, folder: str) -> dict[str, Any]:
    """Return the kvstore spec of a folder."""
    return {**store.spec, "path": f"{store.spec['path']}{folder}/"}


def _unreadable(store: Store, name: str, expected: str | None, found: str) -> CheckpointError:
    return CheckpointError(
        "a dense parameter cannot be read",
        path=store.path(DENSE),
        key=name,
        expected=expected,
        found=found,
        remedy="copy the artifact again",
    )


def _little_endian(array: np.ndarray) -> memoryview:
    """Return the bytes that a checksum is of."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return little.reshape(-1).view(np.uint8).data


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
