"""One block of GPTQ: a few columns of one expert, rounded in turn, in float32 at full precision.

Inside a block the products of `gptq.py` go on at a smaller scale: a panel of columns gets the pull of the block's
earlier columns in one product, and each column that of the panel's. So a step touches the panel, not the block.

Weights lie transposed here, [column, out]; `lower` and `curvature` are the factor's part for these columns.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from qmoe_jax.quantization.grids import Grid

# Columns of a panel, whose deviations should stay in a core's cache: 400 KB at 6,144 rows. There 8 to 32 are
# equally fast on a CPU, and a panel as wide as the block many times slower.
PANEL = 16

Index = Int[Array, ""]
Columns = Float[Array, "column out"]
Rounded = tuple[UInt8[Array, "column out"], Columns, Float[Array, "out"]]

dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)


def quantize_block(
    w: Columns,
    pull: Columns,
    lower: Float[Array, "column column"],
    curvature: Float[Array, "column"],
    *,
    levels: Float[Array, "group out 2"],
    group: Int[Array, "column"],
    grid: Grid,
) -> Rounded:
    """Rounds a block.

    Args:
      w: the weights.
      pull: what the deviations of all columns before the block ask of each column.
      lower: the factor.
      curvature: what a squared deviation costs in each column.
      levels: the levels of all groups.
      group: the group of each column.
      grid: the digits.

    Returns:
      Digits, deviations from the original weights, and the error of each row, summed over the columns.
    """
    panel = math.gcd(w.shape[0], PANEL)

    def round_panel(p: Index, done: Rounded) -> Rounded:
        digits, deviation, error = done
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=p * panel, slice_size=panel)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=p * panel, axis=0)
        rows = take(lower)
        new_digits, new_deviation, new_error = _quantize_panel(
            take(w),
            take(pull) + dot(rows, deviation),
            take(rows, axis=1),
            take(curvature),
            levels=levels,
            group=take(group),
            grid=grid,
        )
        return put(digits, new_digits), put(deviation, new_deviation), error + new_error

    return lax.fori_loop(0, w.shape[0] // panel, round_panel, _nothing_rounded(w))


def _quantize_panel(
    w: Columns,
    pull: Columns,
    lower: Float[Array, "column column"],
    curvature: Float[Array, "column"],
    *,
    levels: Float[Array, "group out 2"],
    group: Int[Array, "column"],
    grid: Grid,
) -> Rounded:
    """`quantize_block` column by column."""

    def round_column(i: Index, done: Rounded) -> Rounded:
        digits, deviation, error = done
        at = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        target = at(w) + at(pull) + dot(at(lower), deviation)
        column_levels = lax.dynamic_index_in_dim(levels, at(group), keepdims=False)
        digit = grid.quantize(target, column_levels, at(curvature))
        value = grid.dequantize(digit, column_levels)
        error = error + at(curvature) * (target - value) ** 2
        return put(digits, digit), put(deviation, at(w) - value), error

    return lax.fori_loop(0, w.shape[0], round_column, _nothing_rounded(w))


def _nothing_rounded(w: Columns) -> Rounded:
    return jnp.zeros(w.shape, jnp.uint8), jnp.zeros_like(w), jnp.zeros_like(w[0])
