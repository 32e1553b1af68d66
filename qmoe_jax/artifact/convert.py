"""Converts a model from one checkpoint format into another, tensor by tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy.typing as npt

from qmoe_jax.artifact.kinds import runs_packed
from qmoe_jax.artifact.matrices import unpack_digits
from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.huggingface import write_huggingface
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.t5x import write_t5x
from qmoe_jax.checkpoints.upstream import TernaryMatrix, write_upstream
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.parameters import is_expert
from qmoe_jax.progress import ProgressCallback, no_progress
from qmoe_jax.settings import own_settings


@own_settings()
def convert(
    checkpoint: str | os.PathLike[str] | Checkpoint,
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
        progress: called with the ranges, tensors or expert matrices written.

    Memory: that of the writer: about 1 GB, or the largest tensor.

    Raises:
        CheckpointError: the checkpoint cannot be read, something exists at `output`, or the other format
            cannot express this model.
        ValueError: the format is not known, or `dtype` is given for "upstream".
    """
    opened = open_checkpoint(checkpoint)
    if to == "t5x":
        return write_t5x(opened, output, step=step, dtype=dtype, progress=progress)
    if to == "huggingface":
        return write_huggingface(opened, output, dtype=dtype, progress=progress)
    if to != "upstream":
        raise ValueError(f"to: expected 't5x', 'huggingface' or 'upstream', found {to!r}")
    if dtype is not None:
        raise ValueError("dtype: expected None for upstream's format, whose dtypes are fixed")
    artifact = _require_ternary(opened)
    return write_upstream(
        artifact, output, lambda name, expert: _ternary_matrix(artifact, name, expert), progress=progress
    )


def decompress(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    format: Literal["t5x", "huggingface"] = "t5x",
    *,
    dtype: npt.DTypeLike | None = None,
) -> Path:
    """Write a compressed model as a dense checkpoint, and return its path: `convert` under another name."""
    return convert(checkpoint, output, format, dtype=dtype)


def _require_ternary(checkpoint: Checkpoint) -> ArtifactReader:
    """Return the checkpoint if upstream's format can express it.

    Raises:
        CheckpointError: the checkpoint is not an artifact, or has experts that are not ternary with levels
            per row.
    """
    problem, expected = (
        "cannot be written in upstream's format",
        "an artifact whose experts are all ternary, with levels per row (compressed without a group size)",
    )
    if not isinstance(checkpoint, ArtifactReader):
        raise CheckpointError(
            problem, path=checkpoint.path, expected=expected, found=f"a {checkpoint.format} checkpoint",
            remedy="compress it first",
        )  # fmt: skip
    for name in filter(is_expert, checkpoint.names()):
        kind = checkpoint.kind(name)
        if not runs_packed(kind):
            raise CheckpointError(
                problem, path=checkpoint.path, key=name, expected=expected, found=kind or "not compressed"
            )
    return checkpoint


def _ternary_matrix(artifact: ArtifactReader, name: str, expert: int) -> TernaryMatrix:
    """Return the digits and levels of an expert's matrix, as upstream's writer asks for them."""
    (matrix,) = artifact.matrices(name, slice(expert, expert + 1))
    return unpack_digits(matrix, artifact.codebooks), matrix.parts["levels"]
