"""Grids: which levels a row of weights gets, and which of them a weight becomes.

A solver is given a grid and knows nothing else about it. A later grid is one more class that keeps the
contract of `Grid` (held by `tests/quantization/test_grid_contract.py`) and needs no change in a solver.
"""

from __future__ import annotations

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import pytree
from pallas_kernels.quantize_block.rounding import Rounding, TernaryRounding, UniformRounding, divide


class Grid(abc.ABC):
    """Levels of a group of weights in one row, and the digits that name them.

    The contract, beside the shapes: a grid is a pytree, so that its numbers can change without a new
    compilation; zero is a value of every group, exactly; and zeros added to a group change none of its levels
    (solvers pad with columns of zeros). All arithmetic is float32.
    """

    @abc.abstractmethod
    def find_levels(self, w: Float[Array, "*row group"]) -> Float[Array, "*row 2"]:
        """The two numbers that describe the levels of each group of weights."""

    @property
    @abc.abstractmethod
    def rounding(self) -> Rounding:
        """How a weight becomes a digit, given its levels: what the kernels take of a grid."""

    def quantize(
        self, w: Float[Array, "*shape"], levels: Float[Array, "*#shape 2"], curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """The digit of each weight.

        `curvature` is what a squared deviation from `w` costs here: 1 / U[i, i]**2 in GPTQ's terms, 1 where
        nothing is known. A grid that takes the nearest level has no use for it.
        """
        return self.rounding.digit(w, (levels[..., 0], levels[..., 1]), curvature)

    def dequantize(
        self, digits: UInt8[Array, "*shape"], levels: Float[Array, "*#shape 2"]
    ) -> Float[Array, "*shape"]:
        """The value of each digit."""
        return self.rounding.value(digits, (levels[..., 0], levels[..., 1]))


@pytree.register(leaves=(), static=())
@dataclasses.dataclass(frozen=True)
class TernaryGrid(Grid):
    """Zero and the row's extremes: digit 0 is zero, 1 the row minimum (<= 0), 2 the row maximum (>= 0).

    `levels` holds (minimum, maximum). A weight becomes an extreme beyond half of it, strictly: a tie goes to
    zero. A row without negative (positive) weights has minimum (maximum) zero and never uses that digit. A
    row of zeros has the levels -1 and 1, which none of its weights takes.
    """

    def find_levels(self, w: Float[Array, "*row group"]) -> Float[Array, "*row 2"]:
        """(minimum, maximum) of each group."""
        return jnp.stack(_extremes(w), axis=-1)

    @property
    def rounding(self) -> TernaryRounding:
        """To the nearest level."""
        return TernaryRounding()


@pytree.register(leaves=(), static=("bits",))
@dataclasses.dataclass(frozen=True)
class UniformGrid(Grid):
    """Evenly spaced levels from the row's minimum (<= 0) to its maximum (>= 0): value = step * (digit - zero
    point).

    `levels` holds (step, zero point), the zero point being the digit of zero. Rounding is half to even. On a
    CPU this is bit for bit what NumPy's float32 gives.
    """

    bits: int

    @property
    def max_digit(self) -> int:
        """The largest digit."""
        return 2**self.bits - 1

    def find_levels(self, w: Float[Array, "*row group"]) -> Float[Array, "*row 2"]:
        """(step, zero point) of each group."""
        low, high = _extremes(w)
        step = divide(high - low, jnp.float32(self.max_digit))
        step = jnp.where(step > 0, step, 1.0)  # a range whose step underflows: all weights become zero
        return jnp.stack([step, jnp.round(-low / step)], axis=-1)

    @property
    def rounding(self) -> UniformRounding:
        """To the nearest level."""
        return UniformRounding(self.max_digit)


def ternary_grid() -> TernaryGrid:
    """Zero, the row minimum and the row maximum: QMoE's grid."""
    return TernaryGrid()


def uniform_grid(bits: int) -> UniformGrid:
    """2, 3 or 4 bits: evenly spaced levels over the range of the row.

    Raises:
      ValueError: for another number of bits.
    """
    if bits not in (2, 3, 4):
        raise ValueError(
            f"uniform_grid: bits must be 2, 3 or 4, found {bits!r}; for ternary use ternary_grid()."
        )
    return UniformGrid(bits)


def _extremes(w: Float[Array, "*row group"]) -> tuple[Float[Array, "*row"], Float[Array, "*row"]]:
    """Minimum and maximum of each group, with zero counted in; -1 and 1 for a group of zeros."""
    low, high = jnp.minimum(w.min(-1), 0.0), jnp.maximum(w.max(-1), 0.0)
    all_zero = (low == 0) & (high == 0)
    return jnp.where(all_zero, -1.0, low), jnp.where(all_zero, 1.0, high)
