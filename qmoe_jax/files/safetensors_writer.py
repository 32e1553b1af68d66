"""Writes safetensors files as a stream: the header first, then each tensor as it comes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.safetensors import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Data starts at a multiple of this, as the format's own writer has it, so that it can be mapped at any dtype.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """A tensor to come: its name, dtype and shape."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(file: Path, plans: Sequence[Plan], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file with the tensors `plans`, whose values `arrays` gives in the same order.

    Memory: one array. The file is written beside, synced and renamed: it is whole or not there.

    Raises:
        CheckpointError: an array is not what its plan says.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(_header(plans))
        for plan, array in zip(plans, arrays, strict=True):
            if (array.shape, array.dtype) != (plan.shape, plan.dtype):
                raise CheckpointError(
                    "a tensor is not what was announced",
                    path=file,
                    key=plan.key,
                    expected=f"{plan.dtype} {list(plan.shape)}",
                    found=f"{array.dtype} {list(array.shape)}",
                )
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


def _header(plans: Sequence[Plan]) -> bytes:
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        begin, end = end, end + plan.nbytes
        entries[plan.key] = {
            "dtype": _NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
