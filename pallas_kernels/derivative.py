"""Packed weights are constants: what it means to differentiate through them is said once, here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def undifferentiable(op: str, function: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """`function(*args)`, with a clear error where it is differentiated, whatever implements it.

    Raises:
      NotImplementedError: on differentiation, from jax.grad, jax.jvp and the like.
    """
    call = jax.custom_jvp(function)

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op} has no derivative: its weights are packed and frozen. Differentiate a dense model "
            f"(pallas_kernels.unpack gives its weights), or wrap the input in jax.lax.stop_gradient."
        )

    return call(*args)
