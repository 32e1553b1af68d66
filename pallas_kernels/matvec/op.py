"""The public op: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import backend as backends
from pallas_kernels.derivative import undifferentiable
from pallas_kernels.operands import PackedMatrix


@functools.partial(jax.jit, static_argnames=("backend", "interpret"))
def packed_matvec(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """Each token times the matrix of its expert: `y[t] = packed[expert_index[t]] @ x[t]`.

    For few tokens an expert: each decodes its expert's codewords for itself (`packed_matmul` shares them).
    Sums are float32. An expert index out of range counts as the nearest one in range, a code beyond the table
    as its last codeword, a digit beyond a row's end as none: no input reads or writes out of bounds.

    Args:
      packed: the experts.
      x: float32 or bfloat16.
      expert_index: read on the device.
      backend: "cpu", "pallas" or "reference"; by default the first that can run on the platform.
      interpret: run the Pallas kernel in interpret mode, anywhere.

    Returns:
      The products, in the dtype of `x`.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: `backend` cannot run here, or the result is differentiated.
    """
    check_operands("packed_matvec", packed, x, expert_index)
    face = backends.face("matvec", backend, interpret=interpret)
    return undifferentiable("packed_matvec", face, packed, x, expert_index)


def check_operands(
    op: str, packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> None:
    """Raises ValueError where tokens and matrices do not fit together."""
    if x.ndim != 2 or x.shape[1] != packed.width:
        raise ValueError(f"{op}: expected x of shape [t, {packed.width}], found {x.shape}")
    if expert_index.shape != x.shape[:1]:
        raise ValueError(f"{op}: expected an expert index of shape {x.shape[:1]}, found {expert_index.shape}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{op}: expected x in float32 or bfloat16, found {x.dtype}")
