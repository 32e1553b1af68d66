"""A ternary grid that weighs the error of a digit against the bits it costs.

Entropy-constrained quantization: the digit minimizes curvature * (w - value)**2 + rate * bits. One rate for a
whole model gives all its matrices the same slope of error against bits, which is the best split of a size
between them. With rate 0 and level scale 1 this is `ternary_grid()`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pallas_kernels import pytree
from qmoe_jax.quantization.grids import Levels, TernaryGrid

# Bits of the digits 0, 1 and 2 under the probabilities that upstream's dictionary is built for.
DEFAULT_BITS_PER_DIGIT = (-math.log2(0.885), -math.log2(0.0575), -math.log2(0.0575))


@pytree.register(leaves=("rate", "bits_per_digit", "level_scale"), static=())
@dataclasses.dataclass(frozen=True)
class RateDistortionGrid(TernaryGrid):
    """The levels and values of `TernaryGrid`, scaled, with the digit of least error and rate.

    In a tie the lowest digit is taken. It is held to the contract of grids, so that a solver can be given a
    rate; no option of `compress` uses it yet.

    Attributes:
        rate: the cost of a bit, in the unit of curvature * deviation**2: with a Hessian of XᵀX, squared error
            of the layer's output summed over the calibration tokens.
        bits_per_digit: bits of the digits 0, 1 and 2 under the entropy code that follows; zero is the
            cheapest.
        level_scale: factor between the row's extremes and the levels.
    """

    rate: Float[Array, ""]
    bits_per_digit: tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]
    level_scale: Float[Array, ""]

    def find_levels(self, w: Float[Array, "*row group"]) -> Float[Array, "*row 2"]:
        """Return (minimum, maximum) of each group, times `level_scale`."""
        return self.level_scale * super().find_levels(w)

    def digit(
        self, target: Float[Array, "*shape"], levels: Levels, curvature: Float[Array, ""]
    ) -> UInt8[Array, "*shape"]:
        """Return the digit of least curvature * deviation**2 + rate * bits."""
        low, high = levels
        bits = self.bits_per_digit
        zero = curvature * target**2 + self.rate * bits[0]
        one = curvature * (target - low) ** 2 + self.rate * bits[1]
        two = curvature * (target - high) ** 2 + self.rate * bits[2]
        return jnp.where(two < jnp.minimum(zero, one), 2, jnp.where(one < zero, 1, 0)).astype(jnp.uint8)


def rate_distortion_grid(
    rate: float, bits_per_digit: Sequence[float] = DEFAULT_BITS_PER_DIGIT, level_scale: float = 1.0
) -> RateDistortionGrid:
    """Return a grid that accepts `rate` of error for each bit saved.

    Args:
        rate: >= 0, see `RateDistortionGrid`. It may change without a new compilation: bisect it to a target
            size.
        bits_per_digit: bits of the digits 0, 1 and 2, each >= 0, none below the first.
        level_scale: > 0.

    Raises:
        ValueError: an argument is out of range.
    """
    bits = np.asarray(bits_per_digit, np.float32)
    if bits.shape != (3,) or not np.isfinite(bits).all() or bits.min() < 0 or bits.argmin() != 0:
        raise ValueError(
            "rate_distortion_grid: bits_per_digit must be three finite numbers >= 0, the first the least, "
            f"found {bits_per_digit}."
        )
    if not (rate >= 0 and math.isfinite(rate)):
        raise ValueError(f"rate_distortion_grid: rate must be finite and >= 0, found {rate}.")
    if not (level_scale > 0 and math.isfinite(level_scale)):
        raise ValueError(f"rate_distortion_grid: level_scale must be finite and > 0, found {level_scale}.")
    return RateDistortionGrid(jnp.float32(rate), tuple(map(jnp.float32, bits)), jnp.float32(level_scale))
