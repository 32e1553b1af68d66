"""What a kernel does to a sum before it stores it, so that an expert's activations take no pass of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import pytree

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}


@pytree.register(leaves=("gate", "scale"), static=("activation",))
@dataclasses.dataclass(frozen=True)
class Epilogue:
    """`y = scale * activation(sum) * gate`, each factor left out where it is None.

    It goes through `pallas_call` as it is: inside a kernel `gate` and `scale` are references.

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
        """The tile to store; `gate_at` and `scale_at` load what belongs to it, shaped to broadcast with it."""
        if self.activation is not None:
            total = ACTIVATIONS[self.activation](total)
        if self.gate is not None:
            total = total * gate_at(self.gate)
        if self.scale is not None:
            total = total * scale_at(self.scale)
        return total
