"""Grids: the levels of a row of weights, and the digit that each weight becomes.

A solver is given a grid and knows nothing else about it. To add a grid, write a class with the methods of
`Grid` and add a row to `tests/quantization/test_grid_contract.py`; no solver and no kernel changes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pallas_kernels import pytree
from pallas_kernels.quantize_block.arithmetic import divide, round_half_to_even

Levels = Sequence[Float[Array, "*#shape"]]
"""The two numbers of each group, as two arrays."""

A = TypeVar("A", jax.Array, np.ndarray)


class Grid(abc.ABC):
    """Levels of a group of weights in one row, and the digits that name them.

    The contract, beside the shapes: a grid is a pytree of scalars, so that its numbers can change without a
    new compilation; zero is a value of every group, exactly; and zeros added to a group change none of its
    levels (solvers pad with columns of zeros). `digit` and `value` are elementwise and run inside the kernel
    of `pallas_kernels.quantize_block`, so they use operations that Triton has
    (`quantize_block/arithmetic.py`). All arithmetic is float32.

    The two numbers that describe the levels of a group lie side by side in arrays (`find_levels`), and come
    as a pair of arrays to `digit` and `value`: `jnp.unstack(levels, axis=-1)`.
    """

    @property
    @abc.abstractmethod
    def num_digits(self) -> int:
        """The number of digits: a digit is one of 0 .. num_digits - 1."""

    @abc.abstractmethod
    def find_levels(self, w: Float[Array, "*row group"]) -> Float[Array, "*row 2"]:
        """Return the two numbers that describe the levels of each group of weights."""

    @abc.abstractmethod
    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """Return the digit of each target.

        Args:
            target: the weights, with what GPTQ adds to them.
            levels: the two numbers of each target's group.
            curvature: the cost of a squared deviation from the target: 1 / U[i, i]**2 in GPTQ's terms, 1
                where nothing is known. A grid that takes the nearest level does not use it.
        """

    @abc.abstractmethod
    def value(self, digit: UInt8[A, "*shape"], levels: Sequence[Float[A, "*#shape"]]) -> Float[A, "*shape"]:
        """Return the value of each digit: the one definition of dequantization.

        NumPy arrays give a NumPy array, without jax; ternary values have the type of the levels.
        """


@pytree.register(leaves=(), static=())
@dataclasses.dataclass(frozen=True)
class TernaryGrid(Grid):
    """Zero and the row's extremes: digit 0 is zero, 1 the row minimum (<= 0), 2 the row maximum (>= 0).

    The levels are (minimum, maximum). A weight becomes an extreme beyond half of it, strictly: a tie goes to
    zero. A row without negative (positive) weights has minimum (maximum) zero and never uses that digit, even
    for a target that error feedback moved there. A row of zeros has the levels -1 and 1, which none of its
    weights takes.
    """

    @property
    def num_digits(self) -> int:
        """3."""
        return 3

    def find_levels(self, w: Float[Array, "*row group"]) -> Float[Array, "*row 2"]:
        """Return (minimum, maximum) of each group."""
        return jnp.stack(_extremes(w), axis=-1)

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """Return the digit of the nearest level, zero in a tie."""
        low, high = levels
        is_high = (target > high / 2) & (high > 0)
        is_low = (target < low / 2) & (low < 0)
        return jnp.where(is_high, 2, jnp.where(is_low, 1, 0)).astype(jnp.uint8)

    def value(self, digit: UInt8[A, "*shape"], levels: Sequence[Float[A, "*#shape"]]) -> Float[A, "*shape"]:
        """Return zero, the minimum or the maximum, in the type of the levels."""
        low, high = levels
        numpy: Any = np if isinstance(digit, np.ndarray) else jnp
        return numpy.where(digit == 2, high, numpy.where(digit == 1, low, numpy.zeros_like(low)))


@pytree.register(leaves=(), static=("bits",))
@dataclasses.dataclass(frozen=True)
class UniformGrid(Grid):
    """Evenly spaced levels from the row's minimum (<= 0) to its maximum (>= 0).

    A digit stands for step * (digit - zero point).

    The levels are (step, zero point), the zero point being the digit of zero. Rounding is half to even. On a
    CPU this is bit for bit what NumPy's float32 gives.
    """

    bits: int

    @property
    def num_digits(self) -> int:
        """2**bits."""
        return 2**self.bits

    def find_levels(self, w: Float[Array, "*row group"]) -> Float[Array, "*row 2"]:
        """Return (step, zero point) of each group."""
        low, high = _extremes(w)
        step = divide(high - low, jnp.float32(self.num_digits - 1))
        step = jnp.where(step > 0, step, 1.0)  # a range whose step underflows: all weights become zero
        return jnp.stack([step, jnp.round(-low / step)], axis=-1)

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """Return the digit of the nearest level."""
        step, zero_point = levels
        nearest = round_half_to_even(divide(target, step))
        return jnp.clip(nearest + zero_point, 0, self.num_digits - 1).astype(jnp.uint8)

    def value(self, digit: UInt8[A, "*shape"], levels: Sequence[Float[A, "*#shape"]]) -> Float[A, "*shape"]:
        """Return step * (digit - zero point), in float32."""
        step, zero_point = levels
        return step * (digit.astype(np.float32) - zero_point)


def ternary_grid() -> TernaryGrid:
    """Return QMoE's grid: zero, the row minimum and the row maximum."""
    return TernaryGrid()


def uniform_grid(bits: int) -> UniformGrid:
    """Return the grid of 2, 3 or 4 bits: evenly spaced levels over the range of the row.

    Raises:
        ValueError: another number of bits.
    """
    if bits not in (2, 3, 4):
        raise ValueError(
            f"uniform_grid: bits must be 2, 3 or 4, found {bits!r}; for ternary use ternary_grid()."
        )
    return UniformGrid(bits)


def _extremes(w: Float[Array, "*row group"]) -> tuple[Float[Array, "*row"], Float[Array, "*row"]]:
    """Return minimum and maximum of each group, with zero counted in; -1 and 1 for a group of zeros."""
    low, high = jnp.minimum(w.min(-1), 0.0), jnp.maximum(w.max(-1), 0.0)
    all_zero = (low == 0) & (high == 0)
    return jnp.where(all_zero, -1.0, low), jnp.where(all_zero, 1.0, high)
