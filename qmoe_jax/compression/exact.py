"""Dequantization with the levels that quantization found, before they were rounded to be stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from qmoe_jax.artifact.kinds import Codebooks, Ternary
from qmoe_jax.artifact.matrices import PackedExpertMatrix, dequantize

Levels = Mapping[str, np.ndarray]
"""Levels of each matrix of a group, float32 `[expert, out, group, 2]`."""


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
