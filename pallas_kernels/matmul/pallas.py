"""Pallas on a GPU: which kernel multiplies depends on how many tokens an expert has."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.epilogue import Epilogue
from pallas_kernels.matmul.routes import Overrides, route_for
from pallas_kernels.operands import PackedMatrix


def packed_matmul(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    overrides: Overrides = Overrides(),  # noqa: B008 (frozen)
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """See `packed_matmul`; `overrides` replace what the tuning tables say."""
    route = route_for(packed, x.dtype, expert_index, overrides, interpret=interpret)
    return route.leave(route.product(packed, route.enter(x), Epilogue(), x.dtype))
