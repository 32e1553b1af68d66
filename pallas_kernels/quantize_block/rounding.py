"""How a target becomes a digit, given the two levels of its row: written once, in what XLA and Triton both have.

Triton has no rounding, no argmin and no slices of values, so rounding is by addition, the least of three is found
by comparison, and the two levels come as a pair. All arithmetic is float32.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels import pytree

Levels = tuple[Float[Array, "*#shape"], Float[Array, "*#shape"]]

# Around this floats are one unit apart, and the next float's bits are the next integer.
_UNIT_APART = np.float32(1.5 * 2**23)
_FAR = 2.0**20  # farther from zero than any digit, and still rounded


@runtime_checkable
class Rounding(Protocol):
    """A pytree of scalars with the two functions below, elementwise."""

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """The digit of each target; `curvature` is what a squared deviation costs."""
        ...

    def value(self, digit: UInt8[Array, "*shape"], levels: Levels) -> Float[Array, "*shape"]:
        """What each digit stands for."""
        ...


@pytree.register(leaves=(), static=())
@dataclasses.dataclass(frozen=True)
class TernaryRounding:
    """Digit 0 is zero, 1 the lower level (<= 0), 2 the upper one (>= 0): the nearest, zero in a tie.

    A level of zero is never taken: a target that error feedback moved above zero in a row whose upper level is
    zero has value zero, not digit 2.
    """

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """See `Rounding`."""
        low, high = levels
        is_high = (target > high / 2) & (high > 0)
        is_low = (target < low / 2) & (low < 0)
        return jnp.where(is_high, 2, jnp.where(is_low, 1, 0)).astype(jnp.uint8)

    def value(self, digit: UInt8[Array, "*shape"], levels: Levels) -> Float[Array, "*shape"]:
        """See `Rounding`."""
        low, high = levels
        return jnp.where(digit == 2, high, jnp.where(digit == 1, low, 0.0))


@pytree.register(leaves=(), static=("max_digit",))
@dataclasses.dataclass(frozen=True)
class UniformRounding:
    """Levels (step, zero point): value = step * (digit - zero point), half to even, cut to 0 .. `max_digit`."""

    max_digit: int

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """See `Rounding`."""
        step, zero_point = levels
        nearest = round_half_to_even(divide(target, step))
        return jnp.clip(nearest + zero_point, 0, self.max_digit).astype(jnp.uint8)

    def value(self, digit: UInt8[Array, "*shape"], levels: Levels) -> Float[Array, "*shape"]:
        """See `Rounding`."""
        step, zero_point = levels
        return step * (digit.astype(jnp.float32) - zero_point)


@pytree.register(leaves=("zero_cost", "low_cost", "high_cost"), static=())
@dataclasses.dataclass(frozen=True)
class CostRounding:
    """The digits of `TernaryRounding`, by least curvature * deviation**2 + cost; the lowest one in a tie.

    Attributes:
      zero_cost, low_cost, high_cost: what the digits 0, 1 and 2 cost by themselves.
    """

    zero_cost: Float[Array, ""]
    low_cost: Float[Array, ""]
    high_cost: Float[Array, ""]

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """See `Rounding`."""
        low, high = levels
        zero = curvature * target**2 + self.zero_cost
        one = curvature * (target - low) ** 2 + self.low_cost
        two = curvature * (target - high) ** 2 + self.high_cost
        return jnp.where(two < jnp.minimum(zero, one), 2, jnp.where(one < zero, 1, 0)).astype(jnp.uint8)

    def value(self, digit: UInt8[Array, "*shape"], levels: Levels) -> Float[Array, "*shape"]:
        """See `Rounding`."""
        return TernaryRounding().value(digit, levels)


def divide(a: Float[Array, "*shape"], b: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """a / b for finite a; correctly rounded by XLA on a CPU, to 2 units in the last place by Triton.

    XLA turns a division by something broadcast into a multiplication by its reciprocal, which is one unit in the
    last place off often enough to move weights across a rounding border. So b is made to depend on every a;
    nothing less survives `vmap`.
    """
    return a / (b + 0 * a)


def round_half_to_even(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest integer, for |x| up to 2**20; farther away, 2**20 with the sign of x.

    Through the bits, since XLA would take a constant that is added and subtracted for none.
    """
    bits = lax.bitcast_convert_type(jnp.clip(x, -_FAR, _FAR) + _UNIT_APART, jnp.int32)
    return (bits - int(_UNIT_APART.view(np.int32))).astype(jnp.float32)
