"""The grid that a block is quantized on, and the quantized block."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, UInt8

Columns = Float[Array, "column out"]
Levels = tuple[Float[Array, "*#shape"], Float[Array, "*#shape"]]


@runtime_checkable
class BlockGrid(Protocol):
    """A pytree of float32 scalars with two elementwise functions, in operations that Triton has."""

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """Return the digit of each target; `curvature` is the cost of a squared deviation."""
        ...

    def value(self, digit: UInt8[Array, "*shape"], levels: Levels) -> Float[Array, "*shape"]:
        """Return the value of each digit."""
        ...


class RoundedBlock(NamedTuple):
    """A block of quantized columns, transposed like the weights.

    Attributes:
        digits: those of the grid.
        deviation: the weights less their values.
        error: curvature * (target - value)**2 of each row, summed over the columns.
    """

    digits: UInt8[Array, "*expert column out"]
    deviation: Float[Array, "*expert column out"]
    error: Float[Array, "*expert out"]
