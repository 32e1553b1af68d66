"""An expert composed of packed products, for backends without a fused kernel."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.matmul.epilogue import ACTIVATIONS
from pallas_kernels.operands import PackedMatrix


def composed_mlp(
    product: Callable[[PackedMatrix, Array, Array], Array],
    wi: tuple[PackedMatrix, ...],
    wo: PackedMatrix,
    x: Float[Array, "t d_model"],
    expert_index: Int32[Array, "t"],
    scale: Float[Array, "t"],
    *,
    activation: str,
) -> Float[Array, "t d_model"]:
    """Compute `pallas_kernels.packed_mlp` by an implementation of `packed_matmul`."""
    hidden, *gates = (product(matrix, x.astype(jnp.float32), expert_index) for matrix in wi)
    hidden = ACTIVATIONS[activation](hidden)
    for gate in gates:
        hidden = hidden * gate
    return (scale[:, None] * product(wo, hidden, expert_index)).astype(x.dtype)
