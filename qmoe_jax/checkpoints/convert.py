"""One format into another, tensor by tensor, every value as it is stored."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from qmoe_jax.checkpoints.huggingface.writer import write_huggingface
from qmoe_jax.checkpoints.reader import Reader
from qmoe_jax.checkpoints.t5x.writer import write_t5x
from qmoe_jax.parameters import is_expert

WritableFormat = Literal["t5x", "huggingface"]


@dataclasses.dataclass(frozen=True)
class ReaderTensor:
    """One parameter of any `Reader` as a lazy tensor."""

    reader: Reader
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.reader.shape(self.name)

    @property
    def dtype(self) -> np.dtype:
        """The parameter's stored dtype."""
        return self.reader.dtype(self.name)

    def read(self, rows: slice) -> np.ndarray:
        """The rows; of a parameter without experts everything is read on the way."""
        return (
            self.reader.read(self.name, rows) if is_expert(self.name) else self.reader.read(self.name)[rows]
        )


def convert(
    reader: Reader,
    output: str | os.PathLike[str],
    format: WritableFormat,
    *,
    dtype: npt.DTypeLike | None = None,
    step: int = 1,
) -> Path:
    """Writes what `reader` reads as a T5X or Hugging Face checkpoint, and returns the path to open it by.

    Values stay as they are bit for bit, unless `dtype` (float32 or bfloat16) rounds them. T5X numbers
    checkpoints by training step: `step` is the one to write, from 1, since T5X takes 0 for none. Memory: that
    of the writer.

    Raises:
        CheckpointError: there is something at `output` already, or the other format cannot say this
            architecture.
    """
    if format == "huggingface":
        return write_huggingface(output, reader, dtype=dtype)
    if format == "t5x":
        return write_t5x(
            output, step, {name: ReaderTensor(reader, name) for name in reader.names()}, dtype=dtype
        )
    raise ValueError(f"unknown format {format!r}: 't5x' or 'huggingface'")
