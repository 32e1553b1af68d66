"""Writes a checkpoint in T5X's own format (version 3), as its `Checkpointer` lays it out on disk."""

from __future__ import annotations

import collections
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from qmoe_jax.checkpoints.t5x.reader import stored_name
from qmoe_jax.files import msgpack as flax_msgpack
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import ArrayTensor, Tensor
from qmoe_jax.parameters import is_expert

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
    tensors = dict(_tensors(params))
    specs = {name: _spec(name, tensor, dtype) for name, tensor in tensors.items()}
    stores = _create(temporary, specs)
    _write(stores, tensors)
    target = _nested({name: {**spec, "kvstore": _kvstore("", name)} for name, spec in specs.items()})
    optimizer = {"state": {"param_states": {}, "step": np.asarray(step, np.int32)}, "target": target}
    index = flax_msgpack.encode_tree({"version": _VERSION, "optimizer": optimizer})
    _write_durably(temporary / "checkpoint", index)
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


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _spec(name: str, tensor: Tensor, dtype: npt.DTypeLike | None) -> dict[str, Any]:
    """The spec of an array as it stands in the msgpack, without its place."""
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
    """Empty arrays for all parameters; at once, since each waits for its description to be synced."""
    context = ts.Context()
    prefix = f"{os.path.abspath(directory)}/"
    opening = {
        name: ts.open({**spec, "kvstore": _kvstore(prefix, name)}, create=True, context=context)
        for name, spec in specs.items()
    }
    return {name: future.result() for name, future in opening.items()}


def _write(stores: Mapping[str, ts.TensorStore], tensors: Mapping[str, Tensor]) -> None:
    """Writes all values. What is under way at a time stays below `_RANGE_BYTES`, but for one range that is
    larger."""
    under_way: collections.deque[tuple[int, ts.WriteFutures]] = collections.deque()
    for name, tensor in tensors.items():
        rows = _rows(name, tensor)
        for start in range(0, tensor.shape[0] if tensor.shape else 1, rows):
            values = tensor.read(slice(start, start + rows)).astype(stores[name].dtype.numpy_dtype)
            while under_way and sum(nbytes for nbytes, _ in under_way) + values.nbytes > _RANGE_BYTES:
                under_way.popleft()[1].result()
            part = stores[name][start : start + rows] if tensor.shape else stores[name]
            under_way.append((values.nbytes, part.write(values)))
    for _, write in under_way:
        write.result()


def _rows(name: str, tensor: Tensor) -> int:
    """How many rows are written at a time: all, or of an expert kernel a range of experts."""
    if is_expert(name):
        return _range_rows(tensor.shape, tensor.dtype.itemsize)
    return tensor.shape[0] if tensor.shape else 1


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
