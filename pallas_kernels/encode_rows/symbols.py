"""Digits as symbols and counts as offsets, for the traced encoders."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt8

from pallas_kernels.encode_rows.operands import EncodeTable


def symbols_of(
    digits: UInt8[Array, "expert row width"], table: EncodeTable
) -> UInt8[Array, "expert symbol row"]:
    """Return rows as symbols below the table's fanout, transposed: the walks of all rows read one line."""
    step = table.symbol_digits
    experts, rows, width = digits.shape
    padded = jnp.pad(jnp.minimum(digits, 2), ((0, 0), (0, 0), (0, -width % step)))
    # Shape: [expert, row, symbol, digit of the symbol]
    grouped = padded.reshape(experts, rows, -1, step)
    weights = (3 ** jnp.arange(step, dtype=jnp.uint8)).reshape(1, 1, 1, step)
    return (grouped * weights).sum(-1, dtype=jnp.uint8).swapaxes(1, 2)


def offsets_of(counts: Int32[Array, "expert row"]) -> Int32[Array, "expert bound"]:
    """Return where the rows begin, and the sum of all counts at the end."""
    return jnp.pad(jnp.cumsum(counts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
