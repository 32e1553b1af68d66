"""The public op: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import backend as backends
from pallas_kernels.derivative import undifferentiable
from pallas_kernels.matvec.op import check_operands
from pallas_kernels.mlp.composed import ACTIVATIONS
from pallas_kernels.operands import PackedMatrix


@functools.partial(jax.jit, static_argnames=("activation", "backend", "interpret"))
def packed_mlp(
    wi: PackedMatrix | tuple[PackedMatrix, PackedMatrix],
    wo: PackedMatrix,
    x: Float[Array, "t d_model"],
    expert_index: Int32[Array, "t"],
    scale: Float[Array, "t"] | None = None,
    activation: str = "relu",
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "t d_model"]:
    """Each token through its expert: `y = scale * (wo @ activation(wi @ x))`.

    With a pair of `wi` the expert is gated: `y = scale * (wo @ (activation(wi[0] @ x) * (wi[1] @ x)))`.
    Everything inside is float32, whatever `x` is. How many tokens an expert has decides how its codewords are
    read.

    Args:
      wi: [expert, d_ff, d_model], or two of them.
      wo: [expert, d_model, d_ff].
      x: float32 or bfloat16.
      expert_index: read on the device; out of range counts as the nearest in range.
      scale: the router's probability of each token's expert; 1 by default.
      activation: "relu" or "gelu" (the tanh form, as jax.nn.gelu).
      backend: "cpu", "pallas" or "reference"; by default the first that can run on the platform.
      interpret: run the Pallas kernels in interpret mode, anywhere.

    Returns:
      The outputs, in the dtype of `x`.

    Raises:
      ValueError: shapes or dtypes do not fit, or the activation is none of these.
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
        raise ValueError(f"packed_mlp: expected an activation of {sorted(ACTIVATIONS)}, found {activation!r}")
    if scale is None:
        scale = jnp.ones(x.shape[0], jnp.float32)
    if scale.shape != x.shape[:1]:
        raise ValueError(f"packed_mlp: expected scale of shape {x.shape[:1]}, found {scale.shape}")
    face = backends.face("mlp", backend, interpret=interpret)
    run = functools.partial(face, activation=activation)
    return undifferentiable("packed_mlp", run, pair, wo, x, expert_index, scale.astype(jnp.float32))
