"""The result of quantization."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Bool, Float, Int32, UInt8

from pallas_kernels import pytree


@pytree.register(
    leaves=("values", "digits", "levels", "error", "fallback", "group_index"),
    static=(),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """The quantized matrices of several experts.

    Invariant: `values` are the grid's values of `digits` under the levels of each column's group, so an
    artifact needs `digits`, `levels` and, with groups in activation order, `group_index`.

    Attributes:
        values: the quantized weights.
        digits: the grid's digits: 0, 1, 2 for ternary, up to 2**bits - 1 for a uniform grid.
        levels: two numbers for each row and group: (minimum, maximum) for ternary, (step, zero point) for a
            uniform grid. One group per row by default.
        error: ½ tr(D H Dᵀ) with D the deviation from the original weights and H the damped Hessian; the
            identity without a Hessian: after a fallback, and for `round_to_nearest`. NaN if a weight
            was NaN.
        fallback: true where the Hessian was zero or could not be factored, so that the expert was rounded to
            nearest.
        group_index: the group of each column: `column // group_size`; with activation order, the column's
            position in that order // group_size.
    """

    values: Float[Array, "expert out in"]
    digits: UInt8[Array, "expert out in"]
    levels: Float[Array, "expert out group 2"]
    error: Float[Array, "expert"]
    fallback: Bool[Array, "expert"]
    group_index: Int32[Array, "expert in"]
