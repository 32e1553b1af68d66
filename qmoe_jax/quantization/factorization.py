"""Damping and factorization of Hessians: one triangular factor, found once and used for any grid.

The textbook way is Cholesky, inverse, Cholesky again, to get U with H⁻¹ = UᵀU. One factorization is enough:
with J the reversal of the order and J H J = C Cᵀ, the lower triangular J Cᵀ J is the inverse of Uᵀ. `gptq.py`
works on that factor directly, which saves the inversion too; here it is split into a unit diagonal and a
scale of each row.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import pytree
from pallas_kernels.operands import AnyArray

# Upstream's value, meant for its scale of a Hessian, n/2 XᵀX over n tokens: it matters only where inputs are
# all but zero.
DAMPING_FLOOR = 1e-6

TOGETHER_BYTES = 1 << 28
"""Bytes of Hessians that are factored at a time: one of c-2048's wo (151 MB), all of a small model's."""


@pytree.register(leaves=("lower", "curvature", "order", "fallback"), static=())
@dataclasses.dataclass(frozen=True)
class Factor:
    """Damped Hessians of several experts as H = Lᵀ diag(curvature) L, columns in the order of quantization.

    Attributes:
        lower: L, lower triangular with a unit diagonal; the identity where `fallback`. GPTQ's U is
            diag(curvature)^-½ L⁻ᵀ.
        curvature: the cost of a squared deviation in each column once those before it are quantized: 1 /
            U_ii²; 1 where `fallback`.
        order: the columns in the order of quantization (activation order); None: as they stand.
        fallback: true where the Hessian was zero, or had no factor (indefinite, infinite or NaN entries).
    """

    lower: Float[Array, "expert in in"]
    curvature: Float[Array, "expert in"]
    order: Int32[Array, "expert in"] | None
    fallback: Bool[Array, "expert"]


def damping_term(
    hessian: Float[AnyArray, "expert in in"], damping: float | Float[Array, ""]
) -> Float[Array, "expert"]:
    """Return the addend of each diagonal: `damping` times its mean, at least `DAMPING_FLOOR`."""
    return jnp.maximum(damping * _diagonal(hessian).mean(axis=-1), DAMPING_FLOOR)


@functools.partial(jax.jit, static_argnames="activation_order")
def factorize(
    hessian: Float[AnyArray, "expert in in"],
    damping: float | Float[Array, ""] = 0.1,
    *,
    activation_order: bool = False,
) -> Factor:
    """Damp and factor the Hessians of several experts.

    Memory: the factors, and twice as much again for `TOGETHER_BYTES` of Hessians at a time.

    Args:
        hessian: XᵀX, symmetric, at any positive scale, not damped.
        damping: fraction of the mean of the diagonal that is added to the diagonal.
        activation_order: order the columns by falling diagonal (ties: as they stand), see `gptq.py`.

    Returns:
        The factors. An expert whose Hessian is zero or has no factor gets the identity and is flagged in
        `fallback`.
    """
    step = functools.partial(_factorize, damping=damping, activation_order=activation_order)
    together = max(1, TOGETHER_BYTES // (4 * hessian.shape[-1] ** 2))
    if together >= hessian.shape[0]:
        return step(hessian)
    return lax.map(lambda one: _without_axis(step(one[None])), hessian, batch_size=together)


def _without_axis(factor: Factor) -> Factor:
    """Return the factor of one expert without the axis of experts."""
    return jax.tree.map(lambda leaf: leaf[0], factor)


def _factorize(
    hessian: Float[AnyArray, "expert in in"], damping: float | Float[Array, ""], activation_order: bool
) -> Factor:
    identity = jnp.eye(hessian.shape[-1], dtype=jnp.float32)[None]
    damped = jnp.asarray(hessian, jnp.float32)
    damped += damping_term(hessian, damping)[:, None, None] * identity
    order = None
    if activation_order:
        order = jnp.argsort(_diagonal(hessian), axis=-1, descending=True).astype(jnp.int32)
        damped = jax.vmap(lambda h, p: h[p][:, p])(damped, order)
    cholesky = lax.linalg.cholesky(damped[:, ::-1, ::-1], symmetrize_input=False)
    lower = cholesky[:, ::-1, ::-1].swapaxes(1, 2)
    # A failed factorization is all NaN.
    fallback = (_diagonal(hessian) == 0).all(axis=-1) | ~jnp.isfinite(lower).all(axis=(1, 2))
    lower = jnp.where(fallback[:, None, None], identity, lower)
    scale = _diagonal(lower)
    return Factor(lower / scale[:, :, None], scale**2, order, fallback)


def _diagonal(x: Float[AnyArray, "expert in in"]) -> Float[Array, "expert in"]:
    return jnp.diagonal(x, axis1=1, axis2=2)
