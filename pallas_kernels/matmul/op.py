"""The public op `packed_matmul`: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.backend import Implementation, Op, get_implementation
from pallas_kernels.derivative import undifferentiable
from pallas_kernels.matmul import reference
from pallas_kernels.operands import PackedMatrix


def _cpu() -> Implementation:
    from pallas_kernels.matmul import cpu

    return cpu.packed_matmul


def _pallas() -> Implementation:
    from pallas_kernels.matmul import routes

    return routes.packed_matmul


def _jax_triton() -> Implementation:
    from pallas_kernels.matmul import jax_triton

    return jax_triton.packed_matmul


OP = Op(
    "packed_matmul",
    {"reference": lambda: reference.packed_matmul, "cpu": _cpu, "pallas": _pallas, "jax_triton": _jax_triton},
)


@functools.partial(jax.jit, static_argnames="backend")
def packed_matmul(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    backend: str | Implementation | None = None,
) -> Float[Array, "t out"]:
    """Multiply each token by the matrix of its expert: `y[t] = packed[expert_index[t]] @ x[t]`.

    Every implementation chooses by the number of tokens per expert: with few, each token decodes the
    codewords of its expert; with many, tokens are grouped by expert on the device, so that each expert is
    decoded once per block of tokens. Sums are float32. No input leads out of bounds: an expert index out of
    range counts as the nearest one in range, a code beyond the table as its last codeword, and digits beyond
    a row's end are dropped.

    Args:
        packed: the experts.
        x: float32 or bfloat16.
        expert_index: read on the device.
        backend: "cpu", "pallas", "pallas_interpret" (the Pallas kernels interpreted, slowly, on any
            platform), "jax_triton", "reference", or a function to use as the implementation; by default the
            first of the platform's backends that can run.

    Returns:
        The products, in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        NotImplementedError: `backend` cannot run here, or the result is differentiated.
    """
    check_operands("packed_matmul", packed, x, expert_index)
    run = get_implementation(OP, backend)
    return undifferentiable("packed_matmul", run, packed, x, expert_index.astype(jnp.int32))


def check_operands(
    op: str, packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> None:
    """Raise ValueError if tokens and matrices do not fit together."""
    if x.ndim != 2 or x.shape[1] != packed.width:
        raise ValueError(f"{op}: expected x of shape [t, {packed.width}], found {x.shape}")
    if expert_index.shape != x.shape[:1]:
        raise ValueError(f"{op}: expected an expert index of shape {x.shape[:1]}, found {expert_index.shape}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{op}: expected x in float32 or bfloat16, found {x.dtype}")
