"""The public op `packed_mlp`: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.backend import Implementation, Op, get_implementation
from pallas_kernels.derivative import undifferentiable
from pallas_kernels.matmul import reference
from pallas_kernels.matmul.epilogue import ACTIVATIONS
from pallas_kernels.matmul.op import check_operands
from pallas_kernels.mlp.composed import composed_mlp
from pallas_kernels.operands import PackedMatrix


def _reference() -> Implementation:
    return functools.partial(composed_mlp, reference.packed_matmul)


def _cpu() -> Implementation:
    from pallas_kernels.mlp import cpu

    return cpu.packed_mlp


def _pallas() -> Implementation:
    from pallas_kernels.mlp import pallas

    return pallas.packed_mlp


def _jax_triton() -> Implementation:
    from pallas_kernels.matmul import jax_triton

    return functools.partial(composed_mlp, jax_triton.packed_matmul)


OP = Op("packed_mlp", {"reference": _reference, "cpu": _cpu, "pallas": _pallas, "jax_triton": _jax_triton})


@functools.partial(jax.jit, static_argnames=("activation", "backend"))
def packed_mlp(
    wi: PackedMatrix | tuple[PackedMatrix, PackedMatrix],
    wo: PackedMatrix,
    x: Float[Array, "t d_model"],
    expert_index: Int32[Array, "t"],
    scale: Float[Array, "t"] | None = None,
    activation: str = "relu",
    *,
    backend: str | Implementation | None = None,
) -> Float[Array, "t d_model"]:
    """Send each token through its expert: `y = scale * (wo @ activation(wi @ x))`.

    With a pair of `wi` the expert is gated: `y = scale * (wo @ (activation(wi[0] @ x) * (wi[1] @ x)))`.
    Activations between the products are float32, whatever the dtype of `x`. As in `packed_matmul`, the number
    of tokens per expert decides how codewords are decoded.

    Args:
        wi: [expert, d_ff, d_model], or two of them.
        wo: [expert, d_model, d_ff].
        x: float32 or bfloat16.
        expert_index: read on the device; out of range counts as the nearest in range.
        scale: the router probability of each token's expert; 1 by default.
        activation: "relu" or "gelu" (the tanh form, as in jax.nn.gelu).
        backend: as in `packed_matmul`.

    Returns:
        The outputs, in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the activation is unknown.
        NotImplementedError: `backend` cannot run here, or the result is differentiated.
    """
    pair = wi if isinstance(wi, tuple) else (wi,)
    for matrix in pair:
        check_operands("packed_mlp", matrix, x, expert_index)
        found = (matrix.num_experts, matrix.rows)
        if found != (wo.num_experts, wo.width):
            raise ValueError(
                f"packed_mlp: expected wi for {wo.num_experts} experts of {wo.width} rows, found {found}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"packed_mlp: expected an activation among {sorted(ACTIVATIONS)}, found {activation!r}"
        )
    if scale is None:
        scale = jnp.ones(x.shape[0], jnp.float32)
    if scale.shape != x.shape[:1]:
        raise ValueError(f"packed_mlp: expected scale of shape {x.shape[:1]}, found {scale.shape}")
    run = functools.partial(get_implementation(OP, backend), activation=activation)
    operands = pair, wo, x, expert_index.astype(jnp.int32), scale.astype(jnp.float32)
    return undifferentiable("packed_mlp", run, *operands)
