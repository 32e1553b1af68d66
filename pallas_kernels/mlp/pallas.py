"""An expert by the Pallas kernels, with activation, gate and router probability in their epilogues."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.matmul.epilogue import Epilogue
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
    overrides: Overrides | None = None,
    interpret: bool = False,
) -> Float[Array, "t d_model"]:
    """Compute `pallas_kernels.packed_mlp`; `overrides` replace tuned configurations.

    Tokens are grouped once for all products. Activations between two products are float32, even where `x` is
    not.
    """
    route = route_for(wi[0], x.dtype, expert_index, overrides, interpret=interpret)
    tokens = route.enter(x)
    gate = route.product(wi[1], tokens, Epilogue(), jnp.float32) if len(wi) == 2 else None
    hidden = route.product(wi[0], tokens, Epilogue(gate=gate, activation=activation), jnp.float32)
    return route.leave(route.product(wo, hidden, Epilogue(scale=route.enter_scale(scale)), x.dtype))
