"""Refuses differentiation of the ops whose weights are constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def undifferentiable(op: str, function: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Return `function(*args)`, with the same error for every implementation if it is differentiated.

    Raises:
        NotImplementedError: on differentiation, by jax.grad, jax.jvp and others.
    """
    call = jax.custom_jvp(function)

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op} has no derivative: its weights are packed and frozen. Differentiate a dense model "
            f"(pallas_kernels.unpack gives its weights), or wrap the input in jax.lax.stop_gradient."
        )

    return call(*args)
