"""Tensors that are read lazily, and the files that hold them."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np


class Tensor(Protocol):
    """One stored tensor. Its shape and dtype are known without reading its data."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes as T5X has them: kernels [in, out], expert kernels [expert, in, out]."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The dtype it is stored in (`ml_dtypes.bfloat16` among them)."""
        ...

    def read(self, rows: slice) -> np.ndarray:
        """A copy of rows `rows` (a range of the first axis; of a scalar: all), read without the rest."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor that already lies in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """The array's dtype."""
        return self.array.dtype

    def read(self, rows: slice) -> np.ndarray:
        """A copy of the rows."""
        return np.array(self.array[rows] if self.array.ndim else self.array)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its size on disk (None: unknown), and what is wrong with it, if anything."""

    name: str
    nbytes: int | None
    problem: str | None = None
