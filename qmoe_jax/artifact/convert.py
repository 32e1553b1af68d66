"""Converts a model from one checkpoint format into another, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from qmoe_jax.artifact.kinds import Ternary
from qmoe_jax.artifact.matrices import unpack_digits
from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.reader import ArtifactReader, PackedKernel
from qmoe_jax.checkpoints.huggingface.writer import write_huggingface
from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.checkpoints.t5x.writer import write_t5x
from qmoe_jax.checkpoints.upstream.writer import TernaryMatrix, write_upstream
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import Tensor
from qmoe_jax.parameters import is_expert
from qmoe_jax.progress import ProgressCallback, no_progress


def convert(
    checkpoint: str | os.PathLike[str] | DenseReader,
    output: str | os.PathLike[str],
    to: Literal["t5x", "huggingface", "upstream"],
    *,
    dtype: npt.DTypeLike | None = None,
    step: int = 1,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Write a checkpoint in another format, and return the path to open it by.

    Args:
        checkpoint: a checkpoint of any format, by path or opened; a compressed one is decompressed.
        output: a directory that is missing or empty; T5X adds its `checkpoint_<step>`.
        to: "t5x", "huggingface" (safetensors), or "upstream", QMoE's own compressed format, which takes an
            artifact whose experts are all ternary, with levels per row.
        dtype: float32 or bfloat16, to round to; by default values stay as they are stored, bit for bit, and
            compressed experts become float32. Not for "upstream", whose dtypes are fixed.
        step: training step that a T5X checkpoint is numbered by, from 1, since T5X takes 0 for none.
        progress: called with the parameters read.

    Memory: that of the writer: about 1 GB, or the largest tensor.

    Raises:
        CheckpointError: the checkpoint cannot be read, something exists at `output`, or the other format cannot
            express this model.
        ValueError: the format is not known, or `dtype` is given for "upstream".
    """
    reader = open_checkpoint(checkpoint)
    if to == "upstream":
        if dtype is not None:
            raise ValueError("dtype: expected None for upstream's format, whose dtypes are fixed")
        written = write_upstream(output, reader, _ternary_matrices(reader, progress))
    elif to == "huggingface":
        written = write_huggingface(output, _counted(reader, progress), dtype=dtype)
    elif to == "t5x":
        written = write_t5x(output, step, _counted(reader, progress).tensors, dtype=dtype)
    else:
        raise ValueError(f"to: expected 't5x', 'huggingface' or 'upstream', found {to!r}")
    return written


def decompress(
    checkpoint: str | os.PathLike[str] | DenseReader,
    output: str | os.PathLike[str],
    format: Literal["t5x", "huggingface"] = "t5x",
    *,
    dtype: npt.DTypeLike | None = None,
) -> Path:
    """Write a compressed model as a dense checkpoint, and return its path: `convert` under another name."""
    return convert(checkpoint, output, format, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _CountedTensor:
    """A lazy tensor that reports the rows read."""

    tensor: Tensor
    report: Callable[[int], None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """Stored dtype of the tensor."""
        return self.tensor.dtype

    def read(self, rows: slice) -> np.ndarray:
        """Read a range of rows."""
        values = self.tensor.read(rows)
        self.report(values.size)
        return values


def _counted(reader: DenseReader, progress: ProgressCallback) -> DenseReader:
    """Return the checkpoint with tensors that report progress; a tensor that is read twice counts once."""
    total, done = sum(math.prod(reader.shape(name)) for name in reader.names()), dict[str, int]()
    progress(0, total, "")

    def counted(name: str) -> _CountedTensor:
        def report(size: int) -> None:
            done[name] = min(done.get(name, 0) + size, math.prod(reader.shape(name)))
            progress(sum(done.values()), total, name)

        return _CountedTensor(reader.tensors[name], report)

    return dataclasses.replace(reader, tensors={name: counted(name) for name in reader.names()})


def _ternary_matrices(reader: DenseReader, progress: ProgressCallback) -> Callable[[str, int], TernaryMatrix]:
    """Return the function by which upstream's writer asks for the digits and levels of an expert's matrix.

    Raises:
        CheckpointError: the checkpoint is not an artifact, or has experts that are not ternary with levels per row.
    """
    problem, expected = (
        "cannot be written in upstream's format",
        "an artifact whose experts are all ternary, with levels per row (compressed without a group size)",
    )
    if not isinstance(reader, ArtifactReader):
        raise CheckpointError(
            problem, path=reader.path, expected=expected, found=f"a {reader.format} checkpoint",
            remedy="compress it first",
        )  # fmt: skip
    kernels = [name for name in reader.names() if is_expert(name)]
    for name in kernels:
        kind = reader.kind(name)
        if not isinstance(kind, Ternary) or kind.group_size is not None or kind.input_scaled:
            raise CheckpointError(
                problem, path=reader.path, key=name, expected=expected, found=kind or "not compressed"
            )
    total, done = len(kernels) * reader.config.num_experts, 0
    progress(0, total, "")

    def ternary(name: str, expert: int) -> TernaryMatrix:
        nonlocal done
        kernel = reader.tensors[name]
        assert isinstance(kernel, PackedKernel)
        matrix = next(kernel.layer.read(slice(expert, expert + 1)))[kernel.matrix]
        done += 1
        progress(done, total, name)
        return unpack_digits(matrix, reader.codebooks), matrix.parts["levels"]

    return ternary
