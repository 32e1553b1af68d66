"""What a rounded block is."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, UInt8

Columns = Float[Array, "column out"]


class RoundedBlock(NamedTuple):
    """A block of columns after rounding, transposed as it came.

    Attributes:
      digits: see `Rounding`.
      deviation: the weights less their values.
      error: curvature * (target - value)**2 of each row, summed over the columns.
    """

    digits: UInt8[Array, "*expert column out"]
    deviation: Float[Array, "*expert column out"]
    error: Float[Array, "*expert out"]
