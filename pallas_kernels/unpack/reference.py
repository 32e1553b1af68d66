"""Unpacking in plain jax.numpy: a cumulative sum places the codewords; nonzeros are scattered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.operands import PackedMatrix, entry_field


def unpack(packed: PackedMatrix, dtype: np.dtype) -> Float[Array, "expert out in"]:
    """Decode as `pallas_kernels.unpack` does."""
    experts = jnp.arange(packed.num_experts)
    return jax.lax.map(lambda expert: unpack_expert(packed, expert).astype(dtype), experts)


def unpack_expert(packed: PackedMatrix, expert: Int32[Array, ""]) -> Float[Array, "out in"]:
    """Return one matrix in float32."""
    table, width, rows = packed.table, packed.width, packed.rows
    entries = jax.lax.bitcast_convert_type(packed.table.entries, jnp.int32)
    code = jnp.minimum(jnp.asarray(packed.codes)[expert].astype(jnp.int32), entries.shape[0] - 1)
    levels = jnp.asarray(packed.levels)[expert].astype(jnp.float32)
    start, count = packed.row_bounds(expert[None])
    index = jnp.arange(code.shape[0])
    row = jnp.clip(jnp.searchsorted(start[0], index, side="right") - 1, 0, rows - 1)
    live = (index >= start[0, row]) & (index < start[0, row] + count[0, row])
    length = jnp.where(live, entries[code, 0] & ((1 << table.field_bits) - 1), 0)
    before = jnp.cumsum(length) - length
    at = before - before[jnp.minimum(start[0, row], code.shape[0] - 1)]
    dense = jnp.zeros((rows, width), jnp.float32)
    for word in range(table.words):
        for slot in range(table.slots):
            position, digit = entry_field(entries[code, word], table.field_bits, slot)
            position = at + position
            here = live & (digit != 0) & (position >= 0) & (position < width)
            level = jnp.where(digit == 1, levels[row, 0], levels[row, 1])
            dense = dense.at[row, jnp.where(here, position, width)].set(level, mode="drop")
    return dense
