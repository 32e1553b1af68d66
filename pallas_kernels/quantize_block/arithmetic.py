"""Float32 arithmetic for the `digit` of a grid, written in operations that XLA and Triton both have.

Triton has no rounding, no argmin and no slices of values: rounding is by addition, the least of three numbers
is found by comparison, and the two levels of a row come as a pair.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Around this number floats are one unit apart, and the next float's bits are the next integer.
_UNIT_APART = np.float32(1.5 * 2**23)
_FAR = 2.0**20  # farther from zero than any digit, and still rounded


def divide(a: Float[Array, "*shape"], b: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Return a / b for finite a; correctly rounded by XLA on a CPU, to 2 units in the last place by Triton.

    XLA turns a division by something broadcast into a multiplication by its reciprocal, which is one unit in
    the last place off often enough to move weights across a rounding border. So b is made to depend on every
    a; nothing less survives `vmap`.
    """
    return a / (b + 0 * a)


def round_half_to_even(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the nearest integer, for |x| up to 2**20; farther away, 2**20 with the sign of x.

    It goes through the bits, since XLA would take a constant that is added and subtracted for none.
    """
    bits = lax.bitcast_convert_type(jnp.clip(x, -_FAR, _FAR) + _UNIT_APART, jnp.int32)
    return (bits - int(_UNIT_APART.view(np.int32))).astype(jnp.float32)
