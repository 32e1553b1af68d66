"""An expert out of packed products: what backends without a fused kernel run."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.epilogue import ACTIVATIONS
from pallas_kernels.operands import PackedMatrix

Product = Callable[[PackedMatrix, Array, Array], Array]


def composed_mlp(
    products: tuple[Product, Product],
    wi: tuple[PackedMatrix, ...],
    wo: PackedMatrix,
    tokens: tuple[Float[Array, "t d_model"], Int32[Array, "t"], Float[Array, "t"]],
    *,
    activation: str,
    matmul_from: int,
) -> Float[Array, "t d_model"]:
    """`packed_mlp` of `tokens` (x, expert index, scale) by `products` (matvec, matmul).

    The second one is for `matmul_from` tokens an expert and more, on average.
    """
    matvec, matmul = products
    x, expert_index, scale = tokens
    product = matmul if x.shape[0] >= matmul_from * wo.num_experts else matvec
    hidden, *gates = (product(matrix, x.astype(jnp.float32), expert_index) for matrix in wi)
    hidden = ACTIVATIONS[activation](hidden)
    for gate in gates:
        hidden = hidden * gate
    return (scale[:, None] * product(wo, hidden, expert_index)).astype(x.dtype)
