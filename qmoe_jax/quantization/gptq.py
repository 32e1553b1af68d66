"""GPTQ over the experts of a layer; `reference.py` has the textbook form, to be read first.

Columns are quantized in order, each compensating the error accumulated so far. With H = Lᵀ C L
(`factorization.py`: L unit lower triangular, C diagonal) and the deviation D = W - Q, the error tr(D H Dᵀ) is
the sum of squares of L Dᵀ, weighted by C. Row i of L Dᵀ depends on the columns up to i alone:

    (L Dᵀ)_i = error_feedback_i + w_i - q_i,    error_feedback_i = Σ_{j<i} L_ij (w_j - q_j)

so the best q_i is the grid's value for the target w_i + error_feedback_i. That is GPTQ: this target is the
weight that it has updated for all earlier columns, and C_ii is its 1 / U_ii². Written like this nothing is
inverted, and the weights of later columns are not rewritten after every block.

Inside, weights lie transposed, [in, out], so that a column is contiguous, and columns are taken in blocks
(`pallas_kernels.quantize_block` quantizes one): the feedback of all earlier columns on a block is a few
matrix products.

Activation order (`factorize(activation_order=True)`) is a permutation of the problem: columns are taken by
falling diagonal of the Hessian, the factor is that of the permuted Hessian, groups are of neighbours in this
order, and results are put back into the order of the weights at the end. Only `_quantize_expert` knows of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int, Int32, UInt8

from pallas_kernels.operands import AnyArray
from pallas_kernels.quantize_block import RoundedBlock, quantize_block
from qmoe_jax.quantization.factorization import Factor, factorize
from qmoe_jax.quantization.grids import Grid
from qmoe_jax.quantization.groups import GroupSchedule, join_groups, split_groups
from qmoe_jax.quantization.quantized import Quantized

Index = Int[Array, ""]
Levels = Float[Array, "group out 2"]
QuantizeBlock = Callable[..., RoundedBlock]

_dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)


def gptq(
    w: Float[AnyArray, "expert out in"],
    hessian: Float[AnyArray, "expert in in"],
    grid: Grid,
    *,
    damping: float = 0.1,
    block_size: int = 128,
    group_size: int | None = None,
    activation_order: bool = False,
    backend: str | None = None,
) -> Quantized:
    """Quantize the weights of several experts so that their outputs change least; float32 at full precision.

    An expert whose Hessian is zero (no tokens) or cannot be factored is rounded to nearest and flagged in
    `fallback`; the others are not affected. Beside its arguments and results this takes three arrays of the
    Hessians' size and two of the weights'.

    Args:
        w: the weights, any float type, finite.
        hessian: XᵀX of each expert's inputs, symmetric, at any positive scale, not damped.
        grid: the levels and digits.
        damping: fraction of the mean of the Hessian's diagonal that is added to the diagonal.
        block_size: columns per block. It changes the result only with groups.
        group_size: columns that share levels, found when their first column is reached; None: the whole row.
        activation_order: quantize the columns of the largest diagonal first. Groups then follow this order.
        backend: of `pallas_kernels.quantize_block`; by default the first that can run on the platform.

    Raises:
        ValueError: the shapes do not fit each other, or an option is out of range.
        NotImplementedError: `backend` cannot run here.
    """
    experts, _, width = w.shape
    if hessian.shape != (experts, width, width):
        raise ValueError(
            f"gptq: weights [expert, out, in] = {w.shape} need a hessian of shape {(experts, width, width)}, "
            f"found {hessian.shape}."
        )
    if not 0 <= damping < math.inf:
        raise ValueError(f"gptq: damping must be finite and >= 0, found {damping}.")
    factor = factorize(hessian, damping, activation_order=activation_order)
    return gptq_with_factor(
        w,
        factor,
        grid,
        block_size=block_size,
        group_size=group_size,
        backend=backend,
    )


def gptq_with_factor(
    w: Float[AnyArray, "expert out in"],
    factor: Factor,
    grid: Grid,
    *,
    block_size: int = 128,
    group_size: int | None = None,
    backend: str | None = None,
) -> Quantized:
    """Run `gptq` on factored Hessians: for several grids over the same ones, and for `relative_error`.

    Raises:
        ValueError: a block or group size is below 1.
        NotImplementedError: `backend` cannot run here.
    """
    if block_size < 1 or (group_size is not None and group_size < 1):
        raise ValueError(
            f"gptq: block_size and group_size must be >= 1, found {block_size} and {group_size}."
        )
    width = w.shape[2]
    schedule = GroupSchedule(width, block_size, width if group_size is None else min(group_size, width))
    values, digits, levels, error = quantize_in_order(
        _ordered(w, factor.order), factor.lower, factor.curvature, grid, schedule=schedule, backend=backend
    )
    group_index = jnp.broadcast_to(
        jnp.arange(width, dtype=jnp.int32) // schedule.group_size, factor.curvature.shape
    )
    if factor.order is not None:
        values, digits, group_index = _reordered(factor.order, values, digits, group_index)
    return Quantized(values, digits, levels, error, factor.fallback, group_index)


@jax.jit
def _ordered(
    w: Float[AnyArray, "expert out in"], order: Int32[Array, "expert in"] | None
) -> Float[Array, "expert out in"]:
    """Return the weights in float32, columns in the order of quantization."""
    w = jnp.asarray(w, jnp.float32)
    return w if order is None else jnp.take_along_axis(w, order[:, None], axis=2)


@jax.jit
def _reordered(
    order: Int32[Array, "expert in"],
    values: Float[Array, "expert out in"],
    digits: UInt8[Array, "expert out in"],
    group_index: Int32[Array, "expert in"],
) -> tuple[Float[Array, "expert out in"], UInt8[Array, "expert out in"], Int32[Array, "expert in"]]:
    """Return what was found for columns in the order of quantization in the order of the weights."""
    place = jnp.argsort(order, axis=-1)
    take = functools.partial(jnp.take_along_axis, axis=-1)
    return take(values, place[:, None]), take(digits, place[:, None]), take(group_index, place)


@functools.partial(jax.jit, static_argnames=("schedule", "backend"))
def quantize_in_order(
    w: Float[Array, "expert out in"],
    lower: Float[Array, "expert in in"],
    curvature: Float[Array, "expert in"],
    grid: Grid,
    *,
    schedule: GroupSchedule,
    backend: str | None,
) -> tuple[
    Float[Array, "expert out in"],
    UInt8[Array, "expert out in"],
    Float[Array, "expert out group 2"],
    Float[Array, "expert"],
]:
    """Return values, digits, levels and error, with the columns quantized in the order in which they stand.

    One program for all orders of columns: apart from permuting them this is all of the work.
    """
    quantize = functools.partial(quantize_block, grid=grid, backend=backend)

    def expert(
        w: Float[Array, "out in"], lower: Float[Array, "in in"], curvature: Float[Array, "in"]
    ) -> tuple[Float[Array, "out in"], UInt8[Array, "out in"], Float[Array, "out group 2"], Float[Array, ""]]:
        digits, levels, error = _quantize_columns(w, lower, curvature, grid, schedule, quantize)
        pair = jnp.unstack(levels[:, :, None], axis=-1)
        values = join_groups(grid.value(split_groups(digits, schedule.group_size), pair), schedule.width)
        return values, digits, levels, error

    return jax.vmap(expert)(w, lower, curvature)


def _quantize_columns(
    w: Float[Array, "out in"],
    lower: Float[Array, "in in"],
    curvature: Float[Array, "in"],
    grid: Grid,
    schedule: GroupSchedule,
    quantize: QuantizeBlock,
) -> tuple[UInt8[Array, "out in"], Float[Array, "out group 2"], Float[Array, ""]]:
    """Return digits, levels and error, with the columns quantized in the order in which they stand."""
    out, width = w.shape
    size, padding = schedule.block_size, schedule.padded_width - schedule.width
    if padding:
        lower = jnp.eye(schedule.padded_width, dtype=jnp.float32).at[:width, :width].set(lower)
    curvature = jnp.pad(curvature, (0, padding))
    group_index = jnp.arange(schedule.padded_width, dtype=jnp.int32) // schedule.group_size
    # The deviations of the columns that are done, and the weights of the others.
    state = jnp.pad(w.T, [(0, padding), (0, 0)])
    if schedule.whole_row:
        levels = grid.find_levels(w)[None]
    else:
        levels = jnp.zeros((schedule.padded_groups, out, 2), jnp.float32)

    def step(
        carry: tuple[Float[Array, "in out"], Levels], block: Index
    ) -> tuple[tuple[Float[Array, "in out"], Levels], tuple[UInt8[Array, "column out"], Float[Array, ""]]]:
        state, levels = carry
        if not schedule.whole_row:
            find = functools.partial(_find_levels, block, state, lower, levels, grid=grid, schedule=schedule)
            levels = lax.cond(schedule.finds_levels(block), find, lambda: levels)
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=block * size, slice_size=size)
        digits, deviation, error = quantize(
            take(state),
            _error_feedback(block, state, lower, size, size),
            take(take(lower), axis=1),
            take(curvature),
            levels=levels,
            group_index=take(group_index),
        )
        state = lax.dynamic_update_slice_in_dim(state, deviation, block * size, axis=0)
        return (state, levels), (digits, error.sum())

    (_, levels), (digits, errors) = lax.scan(
        step, (state, levels), jnp.arange(schedule.num_blocks, dtype=jnp.int32)
    )
    # Shape: digits [block, column, out], levels [group, out, 2]
    digits = digits.reshape(-1, out)[:width].T
    return digits, levels[: schedule.num_groups].swapaxes(0, 1), 0.5 * errors.sum()


def _error_feedback(
    block: Index, state: Float[Array, "in out"], lower: Float[Array, "in in"], block_size: int, length: int
) -> Float[Array, "{length} out"]:
    """Return the feedback of all columns before a block on the `length` columns from its start on."""

    def add(earlier: Index, feedback: Float[Array, "length out"]) -> Float[Array, "length out"]:
        factor = lax.dynamic_slice(lower, (block * block_size, earlier * block_size), (length, block_size))
        return feedback + _dot(factor, lax.dynamic_slice_in_dim(state, earlier * block_size, block_size))

    return lax.fori_loop(0, block, add, jnp.zeros((length, state.shape[1]), jnp.float32))


def _find_levels(
    block: Index,
    state: Float[Array, "in out"],
    lower: Float[Array, "in in"],
    levels: Levels,
    *,
    grid: Grid,
    schedule: GroupSchedule,
) -> Levels:
    """Find the levels of the groups that begin in a block, from the weights that GPTQ holds at its start.

    Those weights are updated for all columns before the block: moved to where, not yet quantized, they
    compensate these columns in full, so that L Dᵀ = 0 from there on.
    """
    span, size, count = schedule.span, schedule.group_size, schedule.groups_per_block
    start, first = block * schedule.block_size, schedule.first_group(block)
    feedback = _error_feedback(block, state, lower, schedule.block_size, span)
    factor = lax.dynamic_slice(lower, (start, start), (span, span))
    moved = lax.dynamic_slice_in_dim(state, start, span)
    moved += solve_triangular(factor, feedback, lower=True, unit_diagonal=True)
    members = lax.dynamic_slice_in_dim(moved, first * size - start, count * size).reshape(count, size, -1)
    return lax.dynamic_update_slice_in_dim(levels, grid.find_levels(members.swapaxes(1, 2)), first, axis=0)
