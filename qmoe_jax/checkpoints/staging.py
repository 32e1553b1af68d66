"""Experts in the order they are used: chunks that span many experts are read once, and kept expert by expert.

T5X cuts an expert kernel into chunks that span many experts: those of switch-c-2048 are [256, 208, 256]
of [2048, 2080, 6144], so reading 16 experts at a time would decompress every chunk 16 times. Here a block
of experts, all that the same chunks hold, is copied to a scratch file when one of them is first asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.files.safetensors import read_into
from qmoe_jax.files.tensor import Tensor
from qmoe_jax.parameters import is_expert


@runtime_checkable
class ChunkedTensor(Tensor, Protocol):
    """A tensor [row, column, ...] stored in chunks that may span several rows."""

    @property
    def rows_per_chunk(self) -> int:
        """The rows a chunk spans."""
        ...

    def read_columns(self, rows: slice) -> Iterator[np.ndarray]:
        """The rows in pieces [row, some columns, ...], one after the other, each chunk read once."""
        ...


@contextlib.contextmanager
def staged(reader: DenseReader, directory: str | os.PathLike[str]) -> Iterator[DenseReader]:
    """`reader` with its experts read through scratch files in `directory`, where chunks span several of them.

    Reading group after group, in ascending order, then reads every chunk once. Disk: a block of experts of
    each kernel that is being read; for c-2048 13.4 GB each of wi and wo. Memory: the rows of a block in as
    many columns as a chunk spans (1.3 GB there), and the chunks that make them. The files are gone when the
    context ends.
    """
    with tempfile.TemporaryDirectory(prefix="experts-", dir=directory) as scratch:
        tensors = dict(reader.tensors)
        for name, tensor in reader.tensors.items():
            if is_expert(name) and isinstance(tensor, ChunkedTensor) and tensor.rows_per_chunk > 1:
                tensors[name] = StagedTensor(tensor, Path(scratch) / name.replace("/", "."))
        yield dataclasses.replace(reader, tensors=tensors)


@dataclasses.dataclass
class StagedTensor:
    """A tensor whose rows are served from `file`, which holds one block of them at a time, row after row."""

    chunked: ChunkedTensor
    file: Path
    block: int | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.chunked.shape

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype."""
        return self.chunked.dtype

    def read(self, rows: slice) -> np.ndarray:
        """The rows, after their blocks were staged. Raises `CheckpointError` as the tensor itself does."""
        array = np.empty((rows.stop - rows.start, *self.shape[1:]), self.dtype)
        span, row_bytes = self.chunked.rows_per_chunk, math.prod(self.shape[1:]) * self.dtype.itemsize
        with self.lock:
            for block in range(rows.start // span, -(-rows.stop // span)):
                start, stop = max(rows.start, block * span), min(rows.stop, (block + 1) * span)
                self._stage(block)
                part = array[start - rows.start : stop - rows.start]
                read_into(self.file, (start - block * span) * row_bytes, part, self.file.name)
        return array

    def _stage(self, block: int) -> None:
        if block == self.block:
            return
        self.block = None  # until the new one is complete
        start = block * self.chunked.rows_per_chunk
        stop = min(start + self.chunked.rows_per_chunk, self.shape[0])
        row_bytes, column = math.prod(self.shape[1:]) * self.dtype.itemsize, 0
        with open(self.file, "wb") as stream:
            for piece in self.chunked.read_columns(slice(start, stop)):
                for row, values in enumerate(piece):
                    stream.seek(row * row_bytes + column)
                    stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
                column += values.nbytes
        self.block = block
