"""The ways that tokens go through packed products on a GPU, each with a layout of its own for the activations.

Few tokens an expert: each decodes for itself (`Separate`). Some: blocks of 8 to 32 share the decoding (`Gathered`).
Many: tensor cores on decoded rows (`Dense`). Activations stay in a route's layout from one product to the next.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouping import TokenBlocks, group_tokens
from pallas_kernels.matmul import gather, tensor_core
from pallas_kernels.matvec import pallas as separate
from pallas_kernels.operands import PackedMatrix


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Explicit choices in place of the tuning tables'; None: theirs."""

    route: tuning.RouteConfig | None = None
    matvec: tuning.MatvecConfig | None = None
    gather: tuning.GatherConfig | None = None
    tensor_core: tuning.TensorCoreConfig | None = None


@runtime_checkable
class Route(Protocol):
    """A layout, and products in it."""

    def enter(self, x: Float[Array, "t width"]) -> Array:
        """Activations in the route's layout."""

    def enter_scale(self, scale: Float[Array, "t"]) -> Array:
        """Factors of the tokens, for an epilogue."""

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """From layout to layout, in `dtype`."""

    def leave(self, y: Array) -> Float[Array, "t width"]:
        """The reverse of `enter`."""


@dataclasses.dataclass(frozen=True)
class Separate:
    """[t, width]: a token decodes its expert's rows for itself."""

    expert: Int32[Array, "t"]
    overrides: Overrides
    interpret: bool

    def enter(self, x: Array) -> Array:
        """As it is."""
        return x

    def enter_scale(self, scale: Array) -> Array:
        """As it is."""
        return scale

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """The matvec kernel."""
        config = self.overrides.matvec
        return separate.product(
            packed, x, self.expert, epilogue, dtype, config=config, interpret=self.interpret
        )

    def leave(self, y: Array) -> Array:
        """As it is."""
        return y


@dataclasses.dataclass(frozen=True)
class Gathered:
    """[block, width, lanes]: the tokens of a block side by side, so that a nonzero loads them all at once."""

    blocks: TokenBlocks
    config: tuning.GatherConfig
    interpret: bool

    def enter(self, x: Array) -> Array:
        """Tokens in their blocks, transposed."""
        return self.blocks.spread(x).transpose(0, 2, 1)

    def enter_scale(self, scale: Array) -> Array:
        """[block, lanes]."""
        return self.blocks.spread(scale)

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """The gather kernel."""
        return gather.product(
            packed, x, self.blocks.expert, epilogue, dtype, config=self.config, interpret=self.interpret
        )

    def leave(self, y: Array) -> Array:
        """Tokens out of their blocks."""
        return self.blocks.collect(y.transpose(0, 2, 1))


@dataclasses.dataclass(frozen=True)
class Dense:
    """[block, lanes, width]: rows decoded to dense tiles, multiplied on tensor cores."""

    blocks: TokenBlocks
    config: tuning.TensorCoreConfig
    interpret: bool

    def enter(self, x: Array) -> Array:
        """Tokens in their blocks."""
        return self.blocks.spread(x)

    def enter_scale(self, scale: Array) -> Array:
        """[block, lanes]."""
        return self.blocks.spread(scale)

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """The tensor-core kernel."""
        return tensor_core.product(
            packed, x, self.blocks, epilogue, dtype, config=self.config, interpret=self.interpret
        )

    def leave(self, y: Array) -> Array:
        """Tokens out of their blocks."""
        return self.blocks.collect(y)


def route_for(
    packed: PackedMatrix,
    dtype: Any,
    expert_index: Int32[Array, "t"],
    overrides: Overrides = Overrides(),
    *,
    interpret: bool = False,
) -> Route:
    """The way for these tokens by their number an expert, on average; `packed` is the first matrix they meet."""
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    tokens = expert.shape[0]
    problem = lambda kind: tuning.Problem.of(kind, packed, dtype, tokens)
    crossover = tuning.choose(problem("route"), overrides.route)
    share = tokens / packed.num_experts
    if tokens == 0 or share < crossover.gather_from:
        return Separate(expert, overrides, interpret)
    if share < crossover.dense_from:
        gathered = tuning.choose(problem("gather"), overrides.gather)
        return Gathered(group_tokens(expert, packed.num_experts, gathered.lanes), gathered, interpret)
    dense = tuning.choose(problem("tensor_core"), overrides.tensor_core)
    return Dense(group_tokens(expert, packed.num_experts, dense.lanes), dense, interpret)
