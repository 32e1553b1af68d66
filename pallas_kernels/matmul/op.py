"""The public op: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels import backend as backends
from pallas_kernels.derivative import undifferentiable
from pallas_kernels.matvec.op import check_operands
from pallas_kernels.operands import PackedMatrix


@functools.partial(jax.jit, static_argnames=("backend", "interpret"))
def packed_matmul(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """Each token times the matrix of its expert: `y[t] = packed[expert_index[t]] @ x[t]`.

    For many tokens an expert: they are grouped by expert first, on the device, and those of an expert share
    the decoding of its codewords. The same as `packed_matvec` in everything else.

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
    check_operands("packed_matmul", packed, x, expert_index)
    face = backends.face("matmul", backend, interpret=interpret)
    return undifferentiable("packed_matmul", face, packed, x, expert_index)
