"""The Pallas kernels, with the activation, the gate and the router's probability in their epilogues."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.epilogue import Epilogue
from pallas_kernels.matmul.routes import Overrides, route_for
from pallas_kernels.operands import PackedMatrix


def packed_mlp(
    wi: tuple[PackedMatrix, ...],
    wo: PackedMatrix,
    x: Float[Array, "t d_model"],
    expert_index: Int32[Array, "t"],
    scale: Float[Array, "t"],
    *,
    activation: str,
    overrides: Overrides = Overrides(),  # noqa: B008 (frozen)
    interpret: bool = False,
) -> Float[Array, "t d_model"]:
    """See `packed_mlp`; `overrides` replace what the tuning tables say.

    Tokens are grouped once for all products. What lies between two products is float32, even where `x` is not.
    """
    route = route_for(wi[0], x.dtype, expert_index, overrides, interpret=interpret)
    tokens = route.enter(x)
    gate = route.product(wi[1], tokens, Epilogue(), jnp.float32) if len(wi) == 2 else None
    hidden = route.product(wi[0], tokens, Epilogue(gate=gate, activation=activation), jnp.float32)
    return route.leave(route.product(wo, hidden, Epilogue(scale=route.enter_scale(scale)), x.dtype))
