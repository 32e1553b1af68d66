"""The Pallas kernels, one after the other."""

from __future__ import annotations

import functools

from jaxtyping import Array, Float, Int32

from pallas_kernels.matmul.pallas import matmul
from pallas_kernels.matvec.pallas import matvec
from pallas_kernels.mlp.composed import composed_mlp
from pallas_kernels.operands import PackedMatrix

MATMUL_FROM = 2


def mlp(
    wi: tuple[PackedMatrix, ...],
    wo: PackedMatrix,
    x: Float[Array, "t d_model"],
    expert_index: Int32[Array, "t"],
    scale: Float[Array, "t"],
    *,
    activation: str,
    interpret: bool = False,
) -> Float[Array, "t d_model"]:
    """See `packed_mlp`."""
    products = functools.partial(matvec, interpret=interpret), functools.partial(matmul, interpret=interpret)
    tokens = x, expert_index, scale
    return composed_mlp(products, wi, wo, tokens, activation=activation, matmul_from=MATMUL_FROM)
