"""One packed matrix of one expert: from the result of quantization, and back to weights."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from qmoe_jax.artifact.bits import smallest_dtype
from qmoe_jax.artifact.kinds import PARTS, Codebooks, Kind, Parts, num_groups
from qmoe_jax.files.finite import first_not_finite
from qmoe_jax.quantization.quantized import Quantized

LEVELS = frozenset({"levels", "scales"})
"""The parts of floating-point numbers; a matrix has one of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedExpertMatrix:
    """One matrix [out, in] of one expert, as it is stored.

    Attributes:
        kind: the kind of packing.
        shape: (out, in).
        parts: ternary: `levels` [out, 2] or [out, group, 2] (minimum, maximum), `counts` [out] (codewords per
            row), `codes` [codeword]. Uniform: `scales` and `zeros` [out] or [out, group], `codes` (digits
            bit-packed, row after row). `column_group` [in], the group of each column, where groups follow
            another order than the columns.
    """

    kind: Kind
    shape: tuple[int, int]
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.nbytes for part in self.parts.values())


def pack_quantized(kind: Kind, quantized: Quantized, codebooks: Codebooks) -> list[PackedExpertMatrix]:
    """Pack the matrices of several experts. Raises as `pack_matrix` does."""
    arrays = (np.asarray(array) for array in (quantized.digits, quantized.levels, quantized.group_index))
    return [
        pack_matrix(kind, digits, levels, codebooks, group_index=group_index)
        for digits, levels, group_index in zip(*arrays, strict=True)
    ]


def pack_matrix(
    kind: Kind,
    digits: UInt8[np.ndarray, "out in"],
    levels: Float[np.ndarray, "out group 2"],
    codebooks: Codebooks,
    *,
    group_index: Int[np.ndarray, "in"] | None = None,
) -> PackedExpertMatrix:
    """Pack one quantized matrix.

    Args:
        kind: the kind of packing.
        digits: ternary 0, 1, 2 (zero, minimum, maximum) or k-bit.
        levels: (minimum, maximum) or (scale, zero point) of each row and group; without groups, one pair per
            row.
        codebooks: by name, the kind's among them.
        group_index: the group of each column; stored where it is not `column // group_size`.

    Raises:
        ValueError: the levels do not fit the kind and shape, or are not finite in the kind's dtype.
    """
    out, width = digits.shape
    groups = num_groups(kind, width)
    if levels.shape != (out, groups, 2):
        raise ValueError(f"expected levels {(out, groups, 2)}, found {levels.shape}")
    _require_finite(levels)
    with np.errstate(over="ignore"):
        parts = kind.pack(digits, levels, codebooks)
    for name in LEVELS & parts.keys():
        _require_finite(parts[name], levels)
    if kind.group_size is None:
        parts |= {name: parts[name][:, 0] for name in ("levels", "scales", "zeros") if name in parts}
    if group_index is not None and not np.array_equal(group_index, _natural_groups(kind, width)):
        parts["column_group"] = group_index.astype(smallest_dtype(group_index))
    return PackedExpertMatrix(kind, (out, width), {name: parts[name] for name in PARTS if name in parts})


def check_levels(matrix: PackedExpertMatrix) -> None:
    """Check that the levels of a stored matrix are finite.

    Raises:
        ValueError: one is not; names the row.
    """
    for name in LEVELS & matrix.parts.keys():
        _require_finite(matrix.parts[name])


def _require_finite(levels: np.ndarray, exact: Float[np.ndarray, "out group 2"] | None = None) -> None:
    """Check stored levels, which `exact`, where given, were rounded to."""
    if (place := first_not_finite(levels)) is not None:
        found = levels[place] if exact is None else exact[place[:2]]
        raise ValueError(
            f"row {place[0]}: expected levels that are finite in {levels.dtype}, found {found.tolist()}"
        )


def unpack_digits(matrix: PackedExpertMatrix, codebooks: Codebooks) -> UInt8[np.ndarray, "out in"]:
    """Return the digits of a packed matrix.

    Raises:
        coding.CorruptStream, ValueError: the matrix is damaged.
    """
    return matrix.kind.digits(matrix.parts, matrix.shape, codebooks)


def dequantize(matrix: PackedExpertMatrix, codebooks: Codebooks) -> Float32[np.ndarray, "out in"]:
    """Return the weights of a packed matrix, with levels as stored.

    Memory: the weights, and with groups twice as much for the levels of each weight. Raises as
        `unpack_digits` does.
    """
    kind, (first, second) = matrix.kind, matrix.kind.levels(matrix.parts)
    if first.shape[1] > 1:
        group_index = matrix.parts.get("column_group", _natural_groups(kind, matrix.shape[1]))
        if group_index.max() >= first.shape[1]:
            raise ValueError(f"expected {first.shape[1]} groups of columns, found {group_index.max()}")
        first, second = first[:, group_index], second[:, group_index]
    return np.asarray(kind.grid.value(unpack_digits(matrix, codebooks), (first, second)))


def column_groups(matrix: PackedExpertMatrix) -> Int[np.ndarray, "in"]:
    """Return the group of each column of a packed matrix, int32."""
    index = matrix.parts.get("column_group", _natural_groups(matrix.kind, matrix.shape[1]))
    return index.astype(np.int32)


def _natural_groups(kind: Kind, width: int) -> Int[np.ndarray, "in"]:
    """Return the group of each column where groups follow the columns."""
    return np.arange(width) // (kind.group_size or width)
