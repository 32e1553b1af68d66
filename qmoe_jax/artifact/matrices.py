"""One matrix of one expert, packed: from what quantization returns, and back to weights."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from qmoe_jax.artifact.bits import smallest_dtype
from qmoe_jax.artifact.kinds import LEVEL_DTYPES, PARTS, Codebooks, Kind, Parts, num_groups
from qmoe_jax.quantization.quantized import Quantized


@dataclasses.dataclass(frozen=True, eq=False)
class PackedExpertMatrix:
    """One matrix [out, in] of one expert, as it is stored.

    Attributes:
      kind: how it is packed.
      shape: (out, in).
      parts: ternary: `levels` [out, 2] or [out, group, 2] (row minimum, maximum), `counts` [out] (codewords a
        row), `codes` [codeword]. Uniform: `scales` and `zeros` [out] or [out, group], `codes` (digits
        bit-packed, row after row). Where they apply: `column_group` [in] (the group of each column, where
        groups follow another order than the columns), `input_scale` [in].
    """

    kind: Kind
    shape: tuple[int, int]
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def pack_quantized(
    kind: Kind,
    quantized: Quantized,
    codebooks: Codebooks,
    input_scale: Float[np.ndarray, "expert in"] | None = None,
) -> list[PackedExpertMatrix]:
    """Packs the matrices of several experts. Raises as `pack_matrix` does."""
    digits, levels = np.asarray(quantized.digits), np.asarray(quantized.levels)
    column_group = np.asarray(quantized.group_index)
    return [
        pack_matrix(
            kind,
            digits[expert],
            levels[expert],
            codebooks,
            column_group=column_group[expert],
            input_scale=None if input_scale is None else input_scale[expert],
        )
        for expert in range(len(digits))
    ]


def pack_matrix(
    kind: Kind,
    digits: UInt8[np.ndarray, "out in"],
    levels: Float[np.ndarray, "out group 2"],
    codebooks: Codebooks,
    *,
    column_group: Int[np.ndarray, "in"] | None = None,
    input_scale: Float[np.ndarray, "in"] | None = None,
) -> PackedExpertMatrix:
    """Packs one quantized matrix.

    Args:
      kind: how.
      digits: ternary 0, 1, 2 (zero, minimum, maximum) or k-bit.
      levels: of each row and group, (minimum, maximum) or (scale, zero point); without groups one a row.
      codebooks: the kind's among them.
      column_group: the group of each column; stored where it is not `column // group_size`.
      input_scale: for a kind that is `input_scaled`: the scale of each column, applied to x.

    Raises:
      ValueError: levels or scales do not fit the kind and shape.
    """
    out, width = digits.shape
    groups = num_groups(kind, width)
    if levels.shape != (out, groups, 2):
        raise ValueError(f"expected levels {(out, groups, 2)}, found {levels.shape}")
    if kind.input_scaled != (input_scale is not None):
        raise ValueError(f"expected a scale for each input column: {kind.input_scaled}")
    parts = kind.pack(digits, levels, codebooks)
    if kind.group_size is None:
        parts |= {name: parts[name][:, 0] for name in ("levels", "scales", "zeros") if name in parts}
    if column_group is not None and not np.array_equal(column_group, _natural_groups(kind, width)):
        parts["column_group"] = column_group.astype(smallest_dtype(column_group))
    if input_scale is not None:
        parts["input_scale"] = input_scale.astype(LEVEL_DTYPES[kind.level_dtype])
    return PackedExpertMatrix(kind, (out, width), {name: parts[name] for name in PARTS if name in parts})


def unpack_digits(matrix: PackedExpertMatrix, codebooks: Codebooks) -> UInt8[np.ndarray, "out in"]:
    """The digits of a packed matrix. Raises `coding.CorruptStream` or `ValueError` where it is damaged."""
    return matrix.kind.digits(matrix.parts, matrix.shape, codebooks)


def dequantize(matrix: PackedExpertMatrix, codebooks: Codebooks) -> Float32[np.ndarray, "out in"]:
    """The weights that a packed matrix stands for, levels as stored. Raises as `unpack_digits` does."""
    kind, parts = matrix.kind, matrix.parts
    column_group = parts.get("column_group", _natural_groups(kind, matrix.shape[1]))
    values = kind.values(parts, unpack_digits(matrix, codebooks), column_group)
    if kind.input_scaled:
        values *= parts["input_scale"].astype(np.float32)
    return values


def _natural_groups(kind: Kind, width: int) -> Int[np.ndarray, "in"]:
    """The group of each column where groups follow the columns."""
    return np.arange(width) // (kind.group_size or width)
