"""Plain jax.numpy: every row of every token takes its next codeword at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.operands import PackedMatrix
from pallas_kernels.streams import field, row_bounds


def matvec(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """See `packed_matvec`."""
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)[:, None]
    start, count = row_bounds(packed, expert[:, 0])
    levels = jnp.asarray(packed.levels)[expert[:, 0]].astype(jnp.float32)
    codes, entries = jnp.asarray(packed.codes), jax.lax.bitcast_convert_type(packed.table.entries, jnp.int32)
    token = jnp.arange(x.shape[0])[:, None]
    width, table = packed.width, packed.table

    def step(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        at, total = carry
        live = k < count
        code = codes[expert, jnp.where(live, start + k, 0)].astype(jnp.int32)
        code = jnp.minimum(code, entries.shape[0] - 1)
        for word in range(table.words):
            entry = entries[code, word]
            for slot in range(table.slots):
                position, digit = field(entry, table.field_bits, slot)
                position = at + position
                level = jnp.where(digit == 1, levels[..., 0], levels[..., 1])
                here = live & (digit != 0) & (position < width)
                value = x[token, jnp.where(here, position, 0)].astype(jnp.float32)
                total = total + jnp.where(here, level * value, 0)
        length = entries[code, 0] & ((1 << table.field_bits) - 1)
        return jnp.minimum(at + jnp.where(live, length, 0), width), total

    zeros = jnp.zeros(count.shape, jnp.int32), jnp.zeros(count.shape, jnp.float32)
    _, total = jax.lax.fori_loop(0, jnp.max(count, initial=0), step, zeros)
    return total.astype(x.dtype)
