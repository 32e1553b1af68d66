"""Plain jax.numpy, in float32 at full precision; the implementation on a CPU.

The feedback of the block's earlier columns on a panel of columns is one product, and that of the panel's on
each column another. So a step touches the panel, not the block.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.quantize_block.operands import BlockGrid, Columns, RoundedBlock

# Columns of a panel, whose deviations should stay in a core's cache: 400 KB at 6,144 rows. There 8 to 32 are
# equally fast on a CPU, and a panel as wide as the block many times slower.
PANEL = 16

Index = Int[Array, ""]

_dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)


def quantize_block(
    w: Columns,
    error_feedback: Columns,
    lower: Float[Array, "column column"],
    curvature: Float[Array, "column"],
    levels: Float[Array, "group out 2"],
    group_index: Int[Array, "column"],
    grid: BlockGrid,
) -> RoundedBlock:
    """See `pallas_kernels.quantize_block`."""
    panel = math.gcd(w.shape[0], PANEL)

    def round_panel(p: Index, done: RoundedBlock) -> RoundedBlock:
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=p * panel, slice_size=panel)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=p * panel, axis=0)
        rows = take(lower)
        new = _round_panel(
            take(w),
            take(error_feedback) + _dot(rows, done.deviation),
            take(rows, axis=1),
            take(curvature),
            levels,
            take(group_index),
            grid,
        )
        return RoundedBlock(
            put(done.digits, new.digits), put(done.deviation, new.deviation), done.error + new.error
        )

    return lax.fori_loop(0, w.shape[0] // panel, round_panel, _nothing_rounded(w))


def _round_panel(
    w: Columns,
    error_feedback: Columns,
    lower: Float[Array, "column column"],
    curvature: Float[Array, "column"],
    levels: Float[Array, "group out 2"],
    group_index: Int[Array, "column"],
    grid: BlockGrid,
) -> RoundedBlock:
    """Round the columns one by one."""

    def round_column(i: Index, done: RoundedBlock) -> RoundedBlock:
        at = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        target = at(w) + at(error_feedback) + _dot(at(lower), done.deviation)
        both = lax.dynamic_index_in_dim(levels, at(group_index), keepdims=False)
        pair = both[..., 0], both[..., 1]
        digit = grid.digit(target, pair, at(curvature))
        value = grid.value(digit, pair)
        error = done.error + at(curvature) * (target - value) ** 2
        return RoundedBlock(put(done.digits, digit), put(done.deviation, at(w) - value), error)

    return lax.fori_loop(0, w.shape[0], round_column, _nothing_rounded(w))


def _nothing_rounded(w: Columns) -> RoundedBlock:
    return RoundedBlock(jnp.zeros(w.shape, jnp.uint8), jnp.zeros_like(w), jnp.zeros_like(w[0]))
