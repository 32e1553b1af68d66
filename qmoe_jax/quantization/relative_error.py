"""The relative output error of quantized matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qmoe_jax.quantization.factorization import Factor
from qmoe_jax.quantization.quantized import Quantized

# Row panels of the triangular product: with 8, 56 % of the multiplications of the square product are left.
PANELS = 8


@jax.jit
def relative_error(
    q: Quantized, w: Float[jax.Array | np.ndarray, "expert out in"], factor: Factor | None
) -> Float[Array, "expert"]:
    """Return tr(D H Dᵀ) / tr(W H Wᵀ) of each expert.

    D is the deviation of the quantized values from the weights W, and H the damped Hessian. The numerator is
    `2 * q.error`. With H = Lᵀ C L the denominator is the sum of squares of L Wᵀ, weighted by C: one
    triangular product, in float32 at full precision. It takes one array of the weights' size, two in
    activation order.

    Args:
        q: the quantized matrices.
        w: the weights that were quantized, any float type.
        factor: the factored Hessians that `q` was found with, damped as they are (`damping_term`), the
            identity where `fallback`. None: H is the identity, as for `round_to_nearest`.

    Returns:
        The errors; 0 for a matrix of zeros, NaN for one with a NaN weight.
    """
    w = jnp.asarray(w, jnp.float32)
    energy = jnp.sum(w**2, axis=(1, 2)) if factor is None else _energy(w, factor)
    return 2 * q.error / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny)


def _energy(w: Float[Array, "expert out in"], factor: Factor) -> Float[Array, "expert"]:
    """Return tr(W H Wᵀ) of each expert."""
    if factor.order is not None:
        w = jnp.take_along_axis(w, factor.order[:, None, :], axis=2)
    energy = jnp.zeros(w.shape[0], jnp.float32)
    width = w.shape[2]
    panel = -(-width // PANELS)
    for start in range(0, width, panel):
        end = min(start + panel, width)
        lower, known = factor.lower[:, start:end, :end], w[:, :, :end]
        product = jnp.einsum("eij,eoj->eio", lower, known, precision=lax.Precision.HIGHEST)
        energy += jnp.sum(factor.curvature[:, start:end] * jnp.sum(product**2, axis=2), axis=1)
    return energy
