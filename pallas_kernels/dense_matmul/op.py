"""The public op `dense_matmul`: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.backend import Implementation, Op, get_implementation
from pallas_kernels.dense_matmul import reference
from pallas_kernels.derivative import undifferentiable


def _cpu() -> Implementation:
    from pallas_kernels.dense_matmul import cpu

    return cpu.dense_matmul


OP = Op("dense_matmul", {"reference": lambda: reference.dense_matmul, "cpu": _cpu})


@functools.partial(jax.jit, static_argnames="backend")
def dense_matmul(
    x: Float[Array, "t in"], w: Float[Array, "rows out"], *, backend: str | Implementation | None = None
) -> Float32[Array, "t out"]:
    """Compute `x @ w` in float32, widening the matrix as it is read.

    For the dense parameters of a decoding step on a CPU, whose time is that of reading them: XLA would first
    write the widened matrix to memory.

    Args:
        x: float32, a few tokens; from a few dozen on, XLA's matrix product is faster.
        w: the matrix in bfloat16, `in` rows, as T5X stores it.
        backend: "cpu", "reference", or a function to use as the implementation; by default the first of the
            platform's backends that can run.

    Raises:
        ValueError: shapes or dtypes do not fit.
        NotImplementedError: `backend` cannot run here, or the result is differentiated.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"dense_matmul: expected x [t, in] and w [in, out], found {x.shape} and {w.shape}")
    if (x.dtype, w.dtype) != (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dense_matmul: expected x in float32, w in bfloat16, found {x.dtype}, {w.dtype}")
    return undifferentiable("dense_matmul", get_implementation(OP, backend), x, w)
