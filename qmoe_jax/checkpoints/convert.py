"""Conversion from one checkpoint format to another, tensor by tensor, every value as it is stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy.typing as npt

from qmoe_jax.checkpoints.huggingface import write_huggingface
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.t5x import write_t5x

WritableFormat = Literal["t5x", "huggingface"]


def convert(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    format: WritableFormat,
    *,
    dtype: npt.DTypeLike | None = None,
    step: int = 1,
) -> Path:
    """Write a checkpoint in T5X's or Hugging Face's format, and return the path to open it by.

    Memory: that of the writer.

    Args:
        checkpoint: what to write; compressed experts are written dequantized.
        output: a directory, see the writers.
        format: "t5x" or "huggingface".
        dtype: float32 or bfloat16 to round to; None: every value as it is stored, bit for bit.
        step: training step that a T5X checkpoint is numbered by, from 1: T5X takes 0 for none.

    Raises:
        CheckpointError: there is something at `output` already, or the format cannot express the architecture.
        ValueError: the format is unknown.
    """
    if format == "huggingface":
        return write_huggingface(checkpoint, output, dtype=dtype)
    if format == "t5x":
        return write_t5x(checkpoint, output, step=step, dtype=dtype)
    raise ValueError(f"unknown format: expected 't5x' or 'huggingface', found {format!r}")
