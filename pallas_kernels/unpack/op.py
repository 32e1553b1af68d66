"""The public op: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import backend as backends
from pallas_kernels.operands import PackedMatrix


@functools.partial(jax.jit, static_argnames=("dtype", "backend", "interpret"))
def unpack(
    packed: PackedMatrix,
    dtype: DTypeLike = jnp.float32,
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "expert out in"]:
    """The matrices, dense. As with `packed_matvec`, no stream reads or writes out of bounds.

    Args:
      packed: the experts.
      dtype: float32 or bfloat16.
      backend: "cpu", "pallas" or "reference"; by default the first that can run on the platform.
      interpret: run the Pallas kernel in interpret mode, anywhere.

    Raises:
      ValueError: `dtype` is another one.
      NotImplementedError: `backend` cannot run here.
    """
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"unpack: expected float32 or bfloat16, found {dtype}")
    return backends.face("unpack", backend, interpret=interpret)(packed, jnp.dtype(dtype))
