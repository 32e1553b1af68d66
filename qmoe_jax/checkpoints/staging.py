"""Experts in the order they are used: chunks that span many experts are read once, and kept expert by expert.

T5X cuts an expert kernel into chunks that span many experts: those of switch-c-2048 are [256, 208, 256] of
[2048, 2080, 6144], so reading 16 experts at a time would decompress every chunk 16 times. Here a block of
experts (all that the same chunks hold) is copied to a scratch file when one of them is first asked for.
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

import numpy as np

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.errors import system_error
from qmoe_jax.files.reading import read_array
from qmoe_jax.files.space import allocate
from qmoe_jax.files.tensor import ChunkedTensor, LazyTensor
from qmoe_jax.parameters import is_expert


@contextlib.contextmanager
def staged(checkpoint: Checkpoint, directory: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Yield a checkpoint whose experts are read through scratch files where chunks span several of them.

    Reading group after group, in ascending order, then reads every chunk once. The files lie in `directory`
    and are removed when the context ends. Disk: a block of experts of each kernel that is being read; for
    c-2048 13.4 GB each of wi and wo. Memory: the rows of a block in as many columns as a chunk spans (1.3 GB
    there), and the chunks that make them.
    """
    with tempfile.TemporaryDirectory(prefix="experts-", dir=directory) as scratch:
        tensors = dict(checkpoint.tensors)
        for name, tensor in checkpoint.tensors.items():
            if is_expert(name) and isinstance(tensor, ChunkedTensor) and tensor.rows_per_chunk > 1:
                blocks = _Blocks(tensor, Path(scratch) / name.replace("/", "."))
                tensors[name] = LazyTensor(tensor.shape, tensor.dtype, blocks.read)
        yield dataclasses.replace(checkpoint, tensors=tensors)


@dataclasses.dataclass
class _Blocks:
    """A scratch file that holds one block of a tensor's rows at a time, row after row.

    Attributes:
        chunked: the tensor.
        file: the scratch file.
        block: number of the block in the file; None until one is complete.
        lock: held by the thread that reads or replaces the block.
    """

    chunked: ChunkedTensor
    file: Path
    block: int | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def read(self, rows: slice) -> np.ndarray:
        """Return rows, after their blocks were staged. Raises as the tensor itself does."""
        shape, dtype = self.chunked.shape, self.chunked.dtype
        array = np.empty((rows.stop - rows.start, *shape[1:]), dtype)
        span, row_bytes = self.chunked.rows_per_chunk, math.prod(shape[1:]) * dtype.itemsize
        with self.lock:
            for block in range(rows.start // span, -(-rows.stop // span)):
                start, stop = max(rows.start, block * span), min(rows.stop, (block + 1) * span)
                self._stage(block)
                part = array[start - rows.start : stop - rows.start]
                read_array(self.file, (start - block * span) * row_bytes, part, self.file.name)
        return array

    def _stage(self, block: int) -> None:
        if block == self.block:
            return
        self.block = None  # until the new one is complete
        start = block * self.chunked.rows_per_chunk
        stop = min(start + self.chunked.rows_per_chunk, self.chunked.shape[0])
        row_bytes, column = math.prod(self.chunked.shape[1:]) * self.chunked.dtype.itemsize, 0
        try:
            with open(self.file, "wb") as stream:
                allocate(stream.fileno(), (stop - start) * row_bytes)
                for piece in self.chunked.read_columns(slice(start, stop)):
                    for row, values in enumerate(piece):
                        stream.seek(row * row_bytes + column)
                        stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
                    column += values.nbytes
        except OSError as error:
            raise system_error(
                "experts cannot be staged here", self.file.parent, error,
                expected=f"{(stop - start) * row_bytes:,} bytes free",
            ) from error  # fmt: skip
        self.block = block
