"""The public op: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import backend as backends
from pallas_kernels.derivative import undifferentiable


@functools.partial(jax.jit, static_argnames="backend")
def dense_matmul(
    x: Float[Array, "t in"], w: Float[Array, "rows out"], *, backend: str | None = None
) -> Float32[Array, "t out"]:
    """`x @ w` in float32, the matrix widened as it is read.

    For the dense parameters of a decoding step on a CPU, where reading them is what takes the time: XLA would widen
    the matrix into memory first.

    Args:
      x: float32, few tokens; from a few dozen on a matrix product of XLA's is faster.
      w: the matrix in bfloat16, `in` rows, as T5X stores it.
      backend: "cpu" or "reference"; by default the first that can run on the platform.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: `backend` cannot run here, or the result is differentiated.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"dense_matmul: expected x [t, in] and w [in, out], found {x.shape} and {w.shape}")
    if (x.dtype, w.dtype) != (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dense_matmul: expected x in float32, w in bfloat16, found {x.dtype}, {w.dtype}")
    face = backends.face("dense_matmul", backend)
    return undifferentiable("dense_matmul", face, x, w)
