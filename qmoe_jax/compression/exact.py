"""Float32 levels, kept beside an unfinished artifact.

An artifact rounds levels to bfloat16, but calibration tokens run on through experts with float32 levels, as
upstream's do. A resumed run must do the same, so the levels of finished groups wait in a hidden folder until
the artifact is finished: 8 bytes per row (4 GB for c-2048).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import load, save

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import Codebooks, Ternary
from qmoe_jax.artifact.matrices import PackedExpertMatrix, dequantize
from qmoe_jax.files.durable import write_durably

FOLDER = ".exact-levels"

Levels = Mapping[str, np.ndarray]
"""Levels of each matrix of a group, float32 `[expert, out, group, 2]`."""


class ExactLevels:
    """The levels of an unfinished artifact's groups, one file per group."""

    def __init__(self, root: Path):
        self.root = root

    def write(self, key: GroupKey, levels: Levels) -> None:
        """Write a group's levels; to be called before the group itself is written."""
        write_durably(
            self._path(key), [save({name: np.ascontiguousarray(part) for name, part in levels.items()})]
        )

    def read(self, key: GroupKey) -> Levels | None:
        """Read a group's levels; None where there are none."""
        path = self._path(key)
        return load(path.read_bytes()) if path.exists() else None

    def remove(self) -> None:
        """Remove all of them, once the artifact is finished."""
        shutil.rmtree(self.root / FOLDER, ignore_errors=True)

    def _path(self, key: GroupKey) -> Path:
        return self.root / FOLDER / key.path


def exact_values(
    experts: Sequence[Mapping[str, PackedExpertMatrix]], levels: Levels, codebooks: Codebooks
) -> dict[str, np.ndarray]:
    """Dequantize the matrices of a group with exact levels in place of the stored ones.

    Returns:
        The matrices by name, float32 `[expert, in, out]`.
    """
    return {
        name: np.stack(
            [dequantize(_exact(expert[name], part[e]), codebooks).T for e, expert in enumerate(experts)]
        )
        for name, part in levels.items()
    }


def _exact(matrix: PackedExpertMatrix, levels: np.ndarray) -> PackedExpertMatrix:
    """Return the matrix with other levels, `[out, group, 2]`."""
    part = "levels" if isinstance(matrix.kind, Ternary) else "scales"
    values = levels if part == "levels" else levels[..., 0]
    parts = {**matrix.parts, part: values.reshape(matrix.parts[part].shape)}
    kind = dataclasses.replace(cast(Any, matrix.kind), level_dtype="float32")  # a dataclass of either kind
    return dataclasses.replace(matrix, kind=kind, parts=parts)
