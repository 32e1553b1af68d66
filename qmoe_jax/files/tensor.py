"""Tensors that are read lazily, functions that make new ones of them, and the files that hold them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np


class Tensor(Protocol):
    """One stored tensor, whose shape and dtype are known without reading its data.

    `LazyTensor` is the plain one. A class of its own is for tensors that can do more, such as
    `ChunkedTensor`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The dtype of what `read` returns (`ml_dtypes.bfloat16` among them)."""
        ...

    def read(self, rows: slice, /) -> np.ndarray:
        """Return a new array with a range of the first axis (of a scalar: all), without reading the rest."""
        ...


@runtime_checkable
class ChunkedTensor(Tensor, Protocol):
    """A tensor [row, column, ...] stored in chunks that may span several rows."""

    @property
    def rows_per_chunk(self) -> int:
        """The rows a chunk spans: reading fewer of them at a time reads the chunk several times."""
        ...

    def read_columns(self, rows: slice) -> Iterator[np.ndarray]:
        """Yield the rows in pieces [row, some columns, ...], one after the other, each chunk read once."""
        ...


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that a function reads.

    Attributes:
        shape: sizes of the axes.
        dtype: dtype of what `read` returns.
        read: takes a range of the first axis with explicit bounds (of a scalar: any) and returns a new array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice], np.ndarray]


def read_all(tensor: Tensor) -> np.ndarray:
    """Return the whole tensor as a new array."""
    return tensor.read(slice(0, tensor.shape[0] if tensor.shape else 0))


def row_ranges(tensor: Tensor, nbytes: int, multiple: int = 1) -> Iterator[slice]:
    """Yield ranges of rows that make up the tensor, each of `nbytes` at most.

    A scalar has one, and a tensor without elements none.

    Args:
        tensor: the tensor.
        nbytes: size of a range; a range has more only where it could not have `multiple` rows.
        multiple: of which the number of rows in every range but the last is a multiple.
    """
    if not tensor.shape:
        yield slice(0, 0)
    if not math.prod(tensor.shape) or not tensor.shape:
        return
    count, row_bytes = tensor.shape[0], math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    rows = max(1, nbytes // (row_bytes * multiple)) * multiple
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def in_memory(array: np.ndarray) -> LazyTensor:
    """Return a tensor whose reads copy from `array`."""
    return LazyTensor(array.shape, array.dtype, lambda rows: np.array(array[rows] if array.ndim else array))


def transposed(tensor: Tensor) -> LazyTensor:
    """Return a matrix [out, in] as [in, out]. Each read reads the whole matrix."""
    return LazyTensor(
        tensor.shape[::-1], tensor.dtype, lambda rows: np.ascontiguousarray(read_all(tensor).T[rows])
    )


def stacked(tensors: Sequence[Tensor]) -> LazyTensor:
    """Return tensors of one shape and dtype as one, along a new first axis. A read touches only its own."""
    shape, dtype = tensors[0].shape, tensors[0].dtype

    def read(rows: slice) -> np.ndarray:
        chosen = tensors[rows]
        array = np.empty((len(chosen), *shape), dtype)
        for row, tensor in zip(array, chosen, strict=True):
            row[...] = read_all(tensor)
        return array

    return LazyTensor((len(tensors), *shape), dtype, read)


def layer(tensor: Tensor, axis: int, index: int) -> LazyTensor:
    """Return one layer of a tensor whose axis `axis` (0 or 1) counts layers.

    With the layers on axis 1, a read reads its rows of all layers.
    """

    def read(rows: slice) -> np.ndarray:
        if axis == 0:
            return tensor.read(slice(index, index + 1))[0][rows]
        return tensor.read(rows)[:, index].copy()

    return LazyTensor(tensor.shape[:axis] + tensor.shape[axis + 1 :], tensor.dtype, read)


def scaled(tensor: Tensor, factor: float) -> LazyTensor:
    """Return a tensor times `factor`, computed and returned in float32."""
    return LazyTensor(
        tensor.shape,
        np.dtype(np.float32),
        lambda rows: tensor.read(rows).astype(np.float32) * np.float32(factor),
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        name: path relative to the checkpoint.
        nbytes: size on disk; None where it is unknown.
        problem: what is wrong with it, if anything.
    """

    name: str
    nbytes: int | None
    problem: str | None = None
