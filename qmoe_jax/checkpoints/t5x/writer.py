"""Writing of checkpoints in T5X's own format (version 3), as its `Checkpointer` lays it out on disk."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts
from flax import traverse_util

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.t5x.reader import stored_name
from qmoe_jax.config import TokenIds
from qmoe_jax.files.durable import make_folder, sync_folder, write_durably
from qmoe_jax.files.errors import CheckpointError, error_number, system_error
from qmoe_jax.files.finite import cast
from qmoe_jax.files.location import tensorstore_path
from qmoe_jax.files.msgpack import encode_tree
from qmoe_jax.files.output import output_directory
from qmoe_jax.files.tensor import Tensor, in_memory
from qmoe_jax.parameters import is_expert
from qmoe_jax.progress import ProgressCallback, no_progress

_VERSION = 3
# T5X's target: a chunk holds at most 64 MiB of the array as it is in memory.
_CHUNK_BYTES = 64 * 2**20
# A range of experts is written as a T5X host writes its part of an expert-parallel model: chunks do not cross
# it.
_RANGE_BYTES = 2**30
_COMPRESSOR = {"id": "gzip", "level": 1}  # fast, and what T5X's Checkpointer takes


def write_t5x(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    *,
    step: int = 1,
    dtype: npt.DTypeLike | None = None,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Write a checkpoint as `directory/checkpoint_<step>`, and return that path.

    The optimizer's state has the step alone, as T5X's `InferenceState` does: T5X loads such a checkpoint for
    inference, and for fine-tuning where missing states come from elsewhere (`fallback_to_scratch`).

    Memory: one tensor at a time, of an expert kernel a range of experts of at most 1 GiB (or one expert);
    chunks under way come on top. The directory is named `checkpoint_<step>.tmp-<time>` until it is complete.

    Args:
        checkpoint: what to write.
        directory: made if it is missing.
        step: the training step.
        dtype: float32 or bfloat16 to round to; None: as stored.
        progress: counts the ranges that are read; its label is the parameter.

    Raises:
        CheckpointError: there is a checkpoint of this step already, the directory cannot be written, a value
            overflows in `dtype`, or the model has other token ids than T5's, which this format cannot tell.
    """
    _require_t5_ids(checkpoint)
    directory = output_directory(directory, inputs=(checkpoint.path,))
    tensors = {name: checkpoint.tensors[name] for name in checkpoint.names()}
    return _write_tensors(tensors, directory, step, dtype, progress)


def _require_t5_ids(checkpoint: Checkpoint) -> None:
    for field in dataclasses.fields(TokenIds):
        if (found := getattr(checkpoint.config.token_ids, field.name)) != field.default:
            raise CheckpointError(
                "has token ids that T5X's format cannot tell: its readers would take T5's",
                path=checkpoint.path,
                key=f"{field.name}_token_id",
                expected=field.default,
                found=found,
                remedy="write it in Hugging Face's format, whose config.json has them",
            )


def write_parameters(
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    step: int = 1,
    dtype: npt.DTypeLike | None = None,
) -> Path:
    """Write nested dicts of JAX or NumPy arrays under T5X's names, as `write_t5x` does."""
    arrays = traverse_util.flatten_dict(dict(params), sep="/")
    tensors = {name: in_memory(np.asarray(array)) for name, array in arrays.items()}
    return _write_tensors(tensors, output_directory(directory), step, dtype, no_progress)


def chunk_shape(write_shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Return the chunks T5X cuts an array into of which a host writes `write_shape`: at most 64 MiB each.

    As long as they are larger, the largest dimension (the first of equals) goes down to its next smaller
    divisor.
    """
    chunk = list(write_shape)
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        axis = chunk.index(max(chunk))
        chunk[axis] = next(size for size in range(chunk[axis] - 1, 0, -1) if write_shape[axis] % size == 0)
    return chunk


def _write_tensors(
    tensors: Mapping[str, Tensor],
    directory: Path,
    step: int,
    dtype: npt.DTypeLike | None,
    progress: ProgressCallback,
) -> Path:
    final = directory / f"checkpoint_{step}"
    if final.exists():
        raise CheckpointError("exists already", path=final, remedy="choose another directory or step")
    temporary = final.with_name(f"{final.name}.tmp-{int(time.time())}")
    make_folder(temporary)
    specs = {name: _spec(name, tensor, dtype) for name, tensor in tensors.items()}
    try:
        _write_arrays(_create(temporary, specs), tensors, final, progress)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        if error_number(error) is None:
            raise
        raise system_error("cannot be written", final, error) from error
    leaves = {name: {**spec, "kvstore": _kvstore("", name)} for name, spec in specs.items()}
    optimizer = {
        # No empty dict anywhere: T5X's `load_t5x_checkpoint` takes one for an array.
        "state": {"step": np.asarray(step, np.int32)},
        "target": traverse_util.unflatten_dict(leaves, sep="/"),
    }
    write_durably(temporary / "checkpoint", [encode_tree({"version": _VERSION, "optimizer": optimizer})])
    temporary.rename(final)
    sync_folder(directory)
    return final


def _spec(name: str, tensor: Tensor, dtype: npt.DTypeLike | None) -> dict[str, Any]:
    """Return the spec of an array as it stands in the msgpack, without its place."""
    write_shape = (_rows(name, tensor), *tensor.shape[1:]) if tensor.shape else ()
    metadata = {
        "chunks": chunk_shape(write_shape, tensor.dtype.itemsize),
        "compressor": _COMPRESSOR,
        "shape": list(tensor.shape),
    }
    return {"driver": "zarr", "dtype": np.dtype(dtype or tensor.dtype).name, "metadata": metadata}


def _kvstore(prefix: str, name: str) -> dict[str, str]:
    return {"driver": "file", "path": f"{prefix}{stored_name(name)}/"}


def _create(directory: Path, specs: Mapping[str, dict[str, Any]]) -> dict[str, ts.TensorStore]:
    """Create empty arrays for all parameters; at once, since each waits for its description to be synced."""
    context = ts.Context()
    prefix = f"{tensorstore_path(directory)}/"
    opening = {
        name: ts.open({**spec, "kvstore": _kvstore(prefix, name)}, create=True, context=context)
        for name, spec in specs.items()
    }
    return {name: future.result() for name, future in opening.items()}


def _write_arrays(
    stores: Mapping[str, ts.TensorStore],
    tensors: Mapping[str, Tensor],
    path: Path,
    progress: ProgressCallback,
) -> None:
    """Write all values, with at most `_RANGE_BYTES` (or a single larger range) under way.

    Raises `CheckpointError`, which names `path`, where a value overflows in the dtype that is written.
    """
    parts = [
        (name, slice(start, start + rows))
        for name, tensor in tensors.items()
        for rows in [_rows(name, tensor)]
        for start in range(0, tensor.shape[0] if tensor.shape else 1, rows)
    ]
    under_way: collections.deque[tuple[int, ts.WriteFutures]] = collections.deque()
    try:
        for done, (name, rows) in enumerate(parts):
            progress(done, len(parts), name)
            store = stores[name]
            first = rows.start if is_expert(name) else None
            values = cast(tensors[name].read(rows), store.dtype.numpy_dtype, path=path, key=name, first=first)
            while under_way and sum(nbytes for nbytes, _ in under_way) + values.nbytes > _RANGE_BYTES:
                under_way.popleft()[1].result()
            under_way.append((values.nbytes, (store[rows] if store.rank else store).write(values)))
        for _, write in under_way:
            write.result()
    finally:
        for _, write in under_way:
            write.commit.exception()  # waits: what goes on being written cannot be removed
    progress(len(parts), len(parts), "")


def _rows(name: str, tensor: Tensor) -> int:
    """Return how many rows are written at a time: all, or of an expert kernel a range of experts."""
    if is_expert(name):
        return _range_rows(tensor.shape, tensor.dtype.itemsize)
    return tensor.shape[0] if tensor.shape else 1


def _range_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Return the largest divisor of the number of experts whose kernels stay below 1 GiB; at least 1."""
    expert_bytes = math.prod(shape[1:]) * itemsize
    fitting = (n for n in range(shape[0], 1, -1) if shape[0] % n == 0 and n * expert_bytes <= _RANGE_BYTES)
    return next(fitting, 1)
