"""Plain jax.numpy: an expert is decoded to dense for each block of its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouping import group_tokens, lanes_for
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.unpack.reference import decode_expert

MOST_LANES = 256  # beyond it the product costs so much more than decoding that sharing that gains nothing


def packed_matmul(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """See `packed_matmul`."""
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    lanes = lanes_for(x.shape[0], packed.num_experts, MOST_LANES)
    groups = group_tokens(expert, packed.num_experts, lanes)

    def block(operands: tuple[Array, Array]) -> Array:
        expert, tokens = operands
        weights = decode_expert(packed, expert)
        return jnp.dot(tokens.astype(jnp.float32), weights.T, precision="highest").astype(x.dtype)

    def nothing(operands: tuple[Array, Array]) -> Array:
        return jnp.zeros((lanes, packed.rows), x.dtype)

    def either(operands: tuple[Array, Array]) -> Array:
        return jax.lax.cond(operands[0] >= 0, block, nothing, operands)

    return groups.collect(jax.lax.map(either, (groups.expert, groups.spread(x))))
