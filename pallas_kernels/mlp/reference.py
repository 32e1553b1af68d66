"""Plain jax.numpy."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.matmul.reference import packed_matmul as matmul
from pallas_kernels.matvec.reference import matvec
from pallas_kernels.mlp.composed import composed_mlp
from pallas_kernels.operands import PackedMatrix

MATMUL_FROM = 4


def packed_mlp(
    wi: tuple[PackedMatrix, ...],
    wo: PackedMatrix,
    x: Float[Array, "t d_model"],
    expert_index: Int32[Array, "t"],
    scale: Float[Array, "t"],
    *,
    activation: str,
) -> Float[Array, "t d_model"]:
    """See `packed_mlp`."""
    tokens = x, expert_index, scale
    return composed_mlp((matvec, matmul), wi, wo, tokens, activation=activation, matmul_from=MATMUL_FROM)
