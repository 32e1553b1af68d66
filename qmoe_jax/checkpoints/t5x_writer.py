"""Writes a checkpoint in T5X's own format (version 3), as its `Checkpointer` lays it out on disk."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from qmoe_jax.checkpoints import flax_msgpack
from qmoe_jax.checkpoints.reader import ArrayTensor, CheckpointError, Tensor, is_expert
from qmoe_jax.checkpoints.t5x import stored_name

_VERSION = 3
# T5X's target: a chunk holds at most 64 MiB of the array as it is in memory.
_CHUNK_BYTES = 64 * 2**20
# A range of experts is written as a T5X host writes its part of an expert-parallel model: chunks do not cross
# it.
_RANGE_BYTES = 2**30
_COMPRESSOR = {"id": "gzip", "level": 1}  # fast, and what T5X's Checkpointer takes


def write_t5x(
    directory: str | os.PathLike[str],
    step: int,
    params: Mapping[str, Any],
    *,
    dtype: npt.DTypeLike | None = None,
) -> Path:
    """Writes `directory/checkpoint_<step>`, and returns its path.

    `params` is a nested dict of arrays (JAX's or NumPy's) under T5X's names, or a flat one of lazy tensors,
    `encoder/encoder_norm/scale` -> `Tensor`. They are stored as `dtype` (float32 or bfloat16), by default as
    they are. The optimizer's state has the step alone: T5X loads such a checkpoint for inference or
    fine-tuning.

    Memory: one tensor at a time, of an expert kernel a range of experts of at most 1 GiB (or one expert);
    chunks under way come on top. The directory is named `checkpoint_<step>.tmp-<time>` until it is complete.

    Raises:
        CheckpointError: there is such a checkpoint already.
    """
    final = Path(directory) / f"checkpoint_{step}"
    if final.exists():
        raise CheckpointError("there is one already", path=final, remedy="choose another directory or step")
    temporary = final.with_name(f"{final.name}.tmp-{int(time.time())}")
    temporary.mkdir(parents=True)
    target: dict[str, Any] = {}
    for name, tensor in _tensors(params):
        _insert(target, name, _write_tensor(temporary, name, tensor, np.dtype(dtype or tensor.dtype)))
    optimizer = {"state": {"param_states": {}, "step": np.asarray(step, np.int32)}, "target": target}
    _write_durably(
        temporary / "checkpoint", flax_msgpack.encode_tree({"version": _VERSION, "optimizer": optimizer})
    )
    temporary.rename(final)
    return final


def chunk_shape(write_shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The chunks T5X cuts an array into of which a host writes `write_shape`: at most 64 MiB each.

    As long as they are larger, the largest dimension (the first of equals) goes down to its next smaller
    divisor.
    """
    chunk = list(write_shape)
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        axis = chunk.index(max(chunk))
        chunk[axis] = next(size for size in range(chunk[axis] - 1, 0, -1) if write_shape[axis] % size == 0)
    return chunk


def _tensors(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value if hasattr(value, "read") else ArrayTensor(np.asarray(value))


def _insert(tree: dict[str, Any], name: str, leaf: object) -> None:
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def _write_tensor(directory: Path, name: str, tensor: Tensor, dtype: np.dtype) -> dict[str, Any]:
    """Writes one array, and returns its spec as it stands in the msgpack: relative to the checkpoint."""
    shape = tensor.shape
    rows = _range_rows(shape, tensor.dtype.itemsize) if is_expert(name) else shape[0] if shape else 1
    chunks = chunk_shape((rows, *shape[1:]) if shape else (), tensor.dtype.itemsize)
    metadata = {"chunks": chunks, "compressor": _COMPRESSOR, "shape": list(shape)}
    spec = {"driver": "zarr", "dtype": dtype.name, "metadata": metadata}
    path = f"{stored_name(name)}/"
    kvstore = {"driver": "file", "path": f"{directory.absolute()}/{path}"}
    store = ts.open({**spec, "kvstore": kvstore}, create=True, context=ts.Context()).result()
    for start in range(0, shape[0] if shape else 1, rows):
        values = tensor.read(slice(start, start + rows)).astype(dtype)
        (store[start : start + rows] if shape else store).write(values).result()
    return {**spec, "kvstore": {"driver": "file", "path": path}}


def _range_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """The largest divisor of the number of experts of which the kernels stay below 1 GiB; at least 1."""
    expert_bytes = math.prod(shape[1:]) * itemsize
    fitting = (n for n in range(shape[0], 1, -1) if shape[0] % n == 0 and n * expert_bytes <= _RANGE_BYTES)
    return next(fitting, 1)


def _write_durably(file: Path, data: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
