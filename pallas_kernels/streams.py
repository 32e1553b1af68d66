"""How the traced implementations read codewords: the fields of an entry, the bounds of a row."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.operands import DIGIT_BITS, PackedMatrix


def field(
    entry: Int32[Array, "*shape"], field_bits: int, slot: int
) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    """(position, digit) of one slot of entries as int32; the masks drop what the sign shifts in."""
    shift = field_bits + slot * (field_bits + DIGIT_BITS)
    return (entry >> shift) & ((1 << field_bits) - 1), (entry >> (shift + field_bits)) & 3


def row_bounds(
    packed: PackedMatrix, expert: Int32[Array, "n"]
) -> tuple[Int32[Array, "n out"], Int32[Array, "n out"]]:
    """(first codeword, number of codewords) of each row, within the capacity whatever is stored."""
    bounds = jnp.clip(jnp.asarray(packed.row_offsets)[expert], 0, packed.codes.shape[-1])
    return bounds[:, :-1], jnp.maximum(bounds[:, 1:] - bounds[:, :-1], 0)
