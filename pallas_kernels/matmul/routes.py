"""The Pallas product: a route for each load, with its own layout of the activations.

With few tokens per expert, each token decodes its expert (`Separate`); with some, blocks of 8 to 32 tokens
share the decoding (`Gathered`); with many, tensor cores multiply decoded rows (`Dense`). Activations stay in
the route's layout from one product to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.matmul.epilogue import Epilogue
from pallas_kernels.matmul.grouping import TokenBlocks, group_tokens
from pallas_kernels.matmul.pallas import gather, separate, tensor_core
from pallas_kernels.operands import PackedMatrix

C = TypeVar("C", bound=tuning.Config)


@dataclasses.dataclass(frozen=True)
class RouteConfig(tuning.Config):
    """Average tokens per expert from which they are gathered in blocks, and from which products are dense."""

    kind: ClassVar[str] = "route"

    gather_from: int
    dense_from: int

    @classmethod
    def heuristic(cls, problem: tuning.Problem) -> RouteConfig:
        """Return crossovers from counted instructions and bytes, for an H100. Not measured."""
        del problem
        return cls(gather_from=2, dense_from=64)


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Configurations to use in place of the tuned ones; None: the tuned one."""

    route: RouteConfig | None = None
    separate: separate.Config | None = None
    gather: gather.Config | None = None
    tensor_core: tensor_core.Config | None = None


@runtime_checkable
class Route(Protocol):
    """A layout of activations, and products in it."""

    def enter(self, x: Float[Array, "t width"]) -> Array:
        """Return activations in the route's layout."""

    def enter_scale(self, scale: Float[Array, "t"]) -> Array:
        """Return factors of the tokens in the layout of an epilogue's scale."""

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """Multiply activations in the layout; the result is in the layout too, in `dtype`."""

    def leave(self, y: Array) -> Float[Array, "t width"]:
        """Reverse `enter`."""


@dataclasses.dataclass(frozen=True)
class Separate:
    """[t, width]: each token decodes the rows of its expert."""

    expert: Int32[Array, "t"]
    config: separate.Config | None
    interpret: bool

    def enter(self, x: Array) -> Array:
        """Return `x`."""
        return x

    def enter_scale(self, scale: Array) -> Array:
        """Return `scale`."""
        return scale

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """Run the `separate` kernel."""
        run = functools.partial(separate.product, config=self.config, interpret=self.interpret)
        return run(packed, x, self.expert, epilogue, dtype)

    def leave(self, y: Array) -> Array:
        """Return `y`."""
        return y


@dataclasses.dataclass(frozen=True)
class Gathered:
    """[block, width, lanes]: the tokens of a block side by side, so that a nonzero loads them all at once."""

    blocks: TokenBlocks
    config: gather.Config
    interpret: bool

    def enter(self, x: Array) -> Array:
        """Place tokens in their blocks, transposed."""
        return self.blocks.dispatch(x).transpose(0, 2, 1)

    def enter_scale(self, scale: Array) -> Array:
        """Return [block, lanes]."""
        return self.blocks.dispatch(scale)

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """Run the `gather` kernel."""
        run = functools.partial(gather.product, config=self.config, interpret=self.interpret)
        return run(packed, x, self.blocks.expert, epilogue, dtype)

    def leave(self, y: Array) -> Array:
        """Take tokens out of their blocks."""
        return self.blocks.combine(y.transpose(0, 2, 1))


@dataclasses.dataclass(frozen=True)
class Dense:
    """[block, lanes, width]: rows are decoded to dense tiles and multiplied on tensor cores."""

    blocks: TokenBlocks
    config: tensor_core.Config
    interpret: bool

    def enter(self, x: Array) -> Array:
        """Place tokens in their blocks."""
        return self.blocks.dispatch(x)

    def enter_scale(self, scale: Array) -> Array:
        """Return [block, lanes]."""
        return self.blocks.dispatch(scale)

    def product(self, packed: PackedMatrix, x: Array, epilogue: Epilogue, dtype: Any) -> Array:
        """Run the `tensor_core` kernel."""
        run = functools.partial(tensor_core.product, config=self.config, interpret=self.interpret)
        return run(packed, x, self.blocks, epilogue, dtype)

    def leave(self, y: Array) -> Array:
        """Take tokens out of their blocks."""
        return self.blocks.combine(y)


def route_for(
    packed: PackedMatrix,
    dtype: Any,
    expert_index: Int32[Array, "t"],
    overrides: Overrides | None = None,
    *,
    interpret: bool = False,
) -> Route:
    """Return the route for these tokens by their number per expert; `packed` is the first matrix."""
    overrides = overrides or Overrides()
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    tokens = expert.shape[0]

    def chosen(config: type[C], explicit: C | None) -> C:
        return tuning.choose(config, tuning.Problem.of(config.kind, packed, dtype, tokens), explicit)

    crossover = chosen(RouteConfig, overrides.route)
    tokens_per_expert = tokens / packed.num_experts
    if tokens == 0 or tokens_per_expert < crossover.gather_from:
        return Separate(expert, overrides.separate, interpret)
    if tokens_per_expert < crossover.dense_from:
        gathered = chosen(gather.Config, overrides.gather)
        return Gathered(group_tokens(expert, packed.num_experts, gathered.lanes), gathered, interpret)
    dense = chosen(tensor_core.Config, overrides.tensor_core)
    return Dense(group_tokens(expert, packed.num_experts, dense.lanes), dense, interpret)


def packed_matmul(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    overrides: Overrides | None = None,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """Multiply as `pallas_kernels.packed_matmul` does; `overrides` replace tuned configurations."""
    route = route_for(packed, x.dtype, expert_index, overrides, interpret=interpret)
    return route.leave(route.product(packed, route.enter(x), Epilogue(), x.dtype))
