"""The product in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.matmul.grouping import group_tokens, lanes_for
from pallas_kernels.operands import PackedMatrix, entry_field
from pallas_kernels.unpack.reference import unpack_expert

GROUPED_FROM = 4
"""Tokens per expert, on average, from which tokens are grouped."""
MAX_LANES = 256
"""Tokens per block: with more, the product costs so much more than decoding that sharing it gains nothing."""


def packed_matmul(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply as `pallas_kernels.packed_matmul` does."""
    route = grouped if x.shape[0] >= GROUPED_FROM * packed.num_experts else separate
    return route(packed, x, expert_index)


def separate(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply token by token: in each step, every row of every token takes its next codeword."""
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)[:, None]
    start, count = packed.row_bounds(expert[:, 0])
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
                position, digit = entry_field(entry, table.field_bits, slot)
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


def grouped(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply block by block: an expert is decoded to a dense matrix for each block of its tokens."""
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    lanes = lanes_for(x.shape[0], packed.num_experts, MAX_LANES)
    blocks = group_tokens(expert, packed.num_experts, lanes)

    def multiply(operands: tuple[Array, Array]) -> Array:
        expert, tokens = operands
        weights = unpack_expert(packed, expert)
        return jnp.dot(tokens.astype(jnp.float32), weights.T, precision="highest").astype(x.dtype)

    def skip(operands: tuple[Array, Array]) -> Array:
        return jnp.zeros((lanes, packed.rows), x.dtype)

    def step(operands: tuple[Array, Array]) -> Array:
        return jax.lax.cond(operands[0] >= 0, multiply, skip, operands)

    return blocks.combine(jax.lax.map(step, (blocks.expert, blocks.dispatch(x))))
