"""What quantization returns."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Bool, Float, Int32, UInt8

from pallas_kernels import pytree


@pytree.register(
    leaves=("values", "digits", "levels", "error", "fallback", "column_group"),
    static=(),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """The quantized matrices of several experts.

    Invariant: `values` are the grid's values of `digits` under the levels of each column's group, so an
      artifact
    needs `digits`, `levels` and, with groups in activation order, `column_group`.

    Attributes:
      values: the weights after quantization.
      digits: the grid's digits: 0, 1, 2 for ternary, up to 2**bits - 1 for a uniform grid.
      levels: two numbers for each row and group: (minimum, maximum) for ternary, (step, zero point) for a
        uniform grid. One group where none were asked for.
      error: ½ tr(D H Dᵀ) with D the deviation from the original weights and H the damped Hessian; the
        identity where there is no Hessian: after a fallback, and for rounding to nearest. NaN if a weight was
        NaN.
      fallback: where the Hessian was zero or could not be factored, so that the expert was rounded to
        nearest.
      column_group: the group of each column: `column // group_size`, or what activation order makes of it.
    """

    values: Float[Array, "expert out in"]
    digits: UInt8[Array, "expert out in"]
    levels: Float[Array, "expert out group 2"]
    error: Float[Array, "expert"]
    fallback: Bool[Array, "expert"]
    column_group: Int32[Array, "expert in"]
