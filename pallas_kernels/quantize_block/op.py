"""The public op `quantize_block`: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Implementation, Op, get_implementation
from pallas_kernels.quantize_block import reference
from pallas_kernels.quantize_block.operands import RoundedBlock
from pallas_kernels.quantize_block.rounding import Rounding


def _pallas() -> Implementation:
    from pallas_kernels.quantize_block import pallas

    return pallas.quantize_block


def _reference() -> Implementation:
    return reference.quantize_block


OP = Op("quantize_block", {"reference": _reference, "cpu": _reference, "pallas": _pallas})


@functools.partial(jax.jit, static_argnames="backend")
def quantize_block(
    w: Float[Array, "*expert column out"],
    pull: Float[Array, "*expert column out"],
    lower: Float[Array, "*expert column column"],
    curvature: Float[Array, "*expert column"],
    *,
    levels: Float[Array, "*expert group out 2"],
    group: Int[Array, "column"],
    rounding: Rounding,
    backend: str | Implementation | None = None,
) -> RoundedBlock:
    """Rounds a block of columns in turn, each making up for the deviations of those before it.

    With the damped Hessian as H = Lᵀ diag(curvature) L, L unit lower triangular, the value of column i is the one
    that `rounding` gives the target w_i + pull_i + Σ_{j<i} L_ij (w_j - value_j), j in the block. The backends add
    the terms in different orders: a target within float32 rounding of a border may fall on either side of it, and
    the columns after it then make up for that. Weights lie transposed, so that a column is contiguous.

    Args:
      w: the weights, float32, as are all numbers here.
      pull: what the deviations of all columns before the block ask of each column.
      lower: L, of these columns alone; only what is below its diagonal is read.
      curvature: what a squared deviation from the target costs in each column.
      levels: two numbers for each row and group, as `rounding` takes them.
      group: the group of each column, the same for all experts; out of range counts as the nearest in range.
      rounding: the digits.
      backend: "cpu" (XLA's compilation of the reference), "pallas", "pallas_interpret", "reference", or a function to
        use as the implementation; by default the first of the platform's backends that can run.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: `backend` cannot run here.
    """
    _check(w, pull, lower, curvature, levels, group)
    group = jnp.clip(group, 0, levels.shape[-3] - 1)
    run = get_implementation(OP, backend)
    for _ in w.shape[:-2]:
        run = jax.vmap(run, in_axes=(0, 0, 0, 0, 0, None, None))
    return run(w, pull, lower, curvature, levels, group, rounding)


def _check(w: Array, pull: Array, lower: Array, curvature: Array, levels: Array, group: Array) -> None:
    *experts, columns, out = w.shape
    wanted = {
        "pull": (pull, (*experts, columns, out)),
        "lower": (lower, (*experts, columns, columns)),
        "curvature": (curvature, (*experts, columns)),
        "levels": (levels, (*experts, levels.shape[-3], out, 2)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(
                f"quantize_block: w {w.shape} needs {name} of shape {shape}, found {array.shape}"
            )
    if group.shape != (columns,):
        raise ValueError(
            f"quantize_block: expected a group for each of {columns} columns, found {group.shape}"
        )
    for name, (array, _) in {"w": (w, w.shape), **wanted}.items():
        if array.dtype != jnp.float32:
            raise ValueError(f"quantize_block: expected {name} in float32, found {array.dtype}")
