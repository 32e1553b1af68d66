"""Round-to-nearest: each weight by itself, without a Hessian."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pallas_kernels.operands import AnyArray
from qmoe_jax.quantization.grids import Grid
from qmoe_jax.quantization.groups import join_groups, split_groups
from qmoe_jax.quantization.quantized import Quantized


@functools.partial(jax.jit, static_argnames="group_size")
def round_to_nearest(
    w: Float[AnyArray, "expert out in"], grid: Grid, group_size: int | None = None
) -> Quantized:
    """Quantize each weight to the digit that the grid gives it with curvature 1.

    Args:
        w: the weights, any float type; the arithmetic is float32.
        grid: the levels and digits.
        group_size: columns that share levels; None: the whole row. The last group may be smaller.

    Raises:
        ValueError: the group size is below 1.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"round_to_nearest: group_size must be None or >= 1, found {group_size}.")
    num_experts, _, width = w.shape
    size = width if group_size is None else group_size
    w = jnp.asarray(w, jnp.float32)
    groups = split_groups(w, size)
    levels = grid.find_levels(groups)
    pair = jnp.unstack(levels[..., None, :], axis=-1)
    digits = grid.digit(groups, pair, jnp.float32(1))
    values = join_groups(grid.value(digits, pair), width)
    return Quantized(
        values=values,
        digits=join_groups(digits, width),
        levels=levels,
        error=0.5 * jnp.sum((w - values) ** 2, axis=(1, 2)),
        fallback=jnp.zeros(num_experts, bool),
        group_index=jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32) // size, (num_experts, width)),
    )
