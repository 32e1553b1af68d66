"""The public op `unpack`: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backend import Implementation, Op, get_implementation
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.unpack import reference


def _cpu() -> Implementation:
    from pallas_kernels.unpack import cpu

    return cpu.unpack


def _pallas() -> Implementation:
    from pallas_kernels.unpack import pallas

    return pallas.unpack


OP = Op("unpack", {"reference": lambda: reference.unpack, "cpu": _cpu, "pallas": _pallas})


@functools.partial(jax.jit, static_argnames=("dtype", "backend"))
def unpack(
    packed: PackedMatrix, dtype: DTypeLike = jnp.float32, *, backend: str | Implementation | None = None
) -> Float[Array, "expert out in"]:
    """Decode the matrices to dense ones. As in `packed_matmul`, no stream leads out of bounds.

    Args:
        packed: the experts.
        dtype: float32 or bfloat16.
        backend: "cpu", "pallas", "pallas_interpret", "reference", or a function to use as the implementation;
            by default the first of the platform's backends that can run.

    Raises:
        ValueError: `dtype` is not one of these.
        NotImplementedError: `backend` cannot run here.
    """
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"unpack: expected float32 or bfloat16, found {dtype}")
    return get_implementation(OP, backend)(packed, jnp.dtype(dtype))
