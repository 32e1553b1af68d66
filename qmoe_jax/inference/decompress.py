"""Compressed models as dense checkpoints, for any other tool to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy.typing as npt

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.checkpoints.convert import convert


def decompress(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: Literal["t5x", "huggingface"] = "t5x",
    *,
    dtype: npt.DTypeLike | None = None,
) -> Path:
    """Write a compressed model (ours or upstream's) as a dense checkpoint, expert range by expert range.

    Args:
        path: the compressed directory.
        output: a directory that is missing or empty.
        format: "t5x" or "huggingface" (safetensors).
        dtype: of the result; None: expert kernels in float32, the rest as stored.

    Returns:
        The path to open the result by.

    Raises:
        CheckpointError: the model cannot be read, or there is something at `output` already.
    """
    return convert(open_checkpoint(path), output, format, dtype=dtype)
