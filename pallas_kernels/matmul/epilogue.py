"""The operations that a kernel applies to its sums before it stores them, and the activations among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import pytree

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
"""The activations between the matrices of an expert; "gelu" is the tanh form."""


@pytree.register(leaves=("gate", "scale"), static=("activation",))
@dataclasses.dataclass(frozen=True)
class Epilogue:
    """`y = scale * activation(sum) * gate`, where each factor may be None: left out.

    Applying it inside the kernel saves a pass over the activations of an expert. It is passed through
    `pallas_call` directly: inside a kernel, `gate` and `scale` are references.

    Attributes:
        gate: a factor for each element, in the layout of the result.
        scale: a factor for each token, in the layout of the result without its rows.
        activation: a key of `ACTIVATIONS`.
    """

    gate: Float[Array, "*result"] | None = None
    scale: Float[Array, "*token"] | None = None
    activation: str | None = None

    def finish(
        self, total: Float[Array, "*tile"], gate_at: Callable[[Any], Array], scale_at: Callable[[Any], Array]
    ) -> Float[Array, "*tile"]:
        """Return the tile to store; `gate_at` and `scale_at` load factors that broadcast with it."""
        if self.activation is not None:
            total = ACTIVATIONS[self.activation](total)
        if self.gate is not None:
            total = total * gate_at(self.gate)
        if self.scale is not None:
            total = total * scale_at(self.scale)
        return total
