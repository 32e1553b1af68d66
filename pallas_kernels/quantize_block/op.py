"""The public op `quantize_block`: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Implementation, Op, get_implementation
from pallas_kernels.quantize_block import reference
from pallas_kernels.quantize_block.operands import BlockGrid, RoundedBlock


def _pallas() -> Implementation:
    from pallas_kernels.quantize_block import pallas

    return pallas.quantize_block


def _reference() -> Implementation:
    return reference.quantize_block


OP = Op("quantize_block", {"reference": _reference, "cpu": _reference, "pallas": _pallas})


@functools.partial(jax.jit, static_argnames="backend")
def quantize_block(
    w: Float[Array, "*expert column out"],
    error_feedback: Float[Array, "*expert column out"],
    lower: Float[Array, "*expert column column"],
    curvature: Float[Array, "*expert column"],
    *,
    levels: Float[Array, "*expert group out 2"],
    group_index: Int[Array, "column"],
    grid: BlockGrid,
    backend: str | Implementation | None = None,
) -> RoundedBlock:
    """Quantize a block of columns in order, each compensating the deviations of those before it.

    With the damped Hessian as H = Lᵀ diag(curvature) L, L unit lower triangular, the value of column i is the
    one that `grid` gives the target w_i + error_feedback_i + Σ_{j<i} L_ij (w_j - value_j), j in the block.
    The backends add the terms in different orders: a target within float32 rounding of a border may fall on
    either side of it, and the columns after it then compensate for that. Weights lie transposed, so that a
    column is contiguous.

    Args:
        w: the weights, float32, as are all numbers here.
        error_feedback: the deviations of all columns before the block, weighted by L, for each column.
        lower: L, of these columns alone; only the entries below its diagonal are read.
        curvature: the cost of a squared deviation from the target in each column.
        levels: two numbers for each row and group, as `grid` takes them.
        group_index: the group of each column, the same for all experts; an index out of range counts as the
            nearest in range.
        grid: the digits and their values.
        backend: "cpu" (XLA's compilation of the reference), "pallas", "pallas_interpret", "reference", or a
            function to use as the implementation; by default the first of the platform's backends that can
            run.

    Raises:
        ValueError: shapes or dtypes do not fit.
        NotImplementedError: `backend` cannot run here.
    """
    _check(w, error_feedback, lower, curvature, levels, group_index)
    group_index = jnp.clip(group_index, 0, levels.shape[-3] - 1)
    run = get_implementation(OP, backend)
    for _ in w.shape[:-2]:
        run = jax.vmap(run, in_axes=(0, 0, 0, 0, 0, None, None))
    return run(w, error_feedback, lower, curvature, levels, group_index, grid)


def _check(
    w: Array, error_feedback: Array, lower: Array, curvature: Array, levels: Array, group_index: Array
) -> None:
    *experts, columns, out = w.shape
    wanted = {
        "error_feedback": (error_feedback, (*experts, columns, out)),
        "lower": (lower, (*experts, columns, columns)),
        "curvature": (curvature, (*experts, columns)),
        "levels": (levels, (*experts, levels.shape[-3], out, 2)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(
                f"quantize_block: w {w.shape} needs {name} of shape {shape}, found {array.shape}"
            )
    if group_index.shape != (columns,):
        raise ValueError(
            f"quantize_block: w {w.shape} needs group_index of shape {(columns,)}, found {group_index.shape}"
        )
    for name, (array, _) in {"w": (w, w.shape), **wanted}.items():
        if array.dtype != jnp.float32:
            raise ValueError(f"quantize_block: expected {name} in float32, found {array.dtype}")
