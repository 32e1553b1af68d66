"""Feed-forward experts: dense or packed matrices under the same parameter names, through one call.

A parameter `expert/wi/kernel` is either an array `[expert, in, out]`, as T5X has it, or a `PackedMatrix`; or, where the
experts are no arrays of the program, `expert/placed` computes them. What lies there decides: a model may keep one
stack dense and another packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from flax import linen as nn
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from pallas_kernels import PackedMatrix, packed_mlp
from pallas_kernels.matmul.epilogue import ACTIVATIONS
from pallas_kernels.matmul.grouping import group_tokens
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.layers import Kernel
from qmoe_jax.models.router import GroupCapacity, Router, Routing, SequenceCapacity


class DenseMLP(nn.Module):
    """The feed-forward part of a layer without experts."""

    config: SwitchConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n embed"]) -> Float[Array, "b n embed"]:
        """`activation(x wi) wo`, gated where the model is."""
        activation = ACTIVATIONS[self.config.activation]
        wide = lambda name: Kernel(self.config.d_ff, ("embed", "mlp"), self.dtype, name=name)
        hidden = (
            activation(wide("wi_0")(x)) * wide("wi_1")(x) if self.config.gated else activation(wide("wi")(x))
        )
        return Kernel(self.config.d_model, ("mlp", "embed"), self.dtype, name="wo")(hidden)


class ExpertKernel(nn.Module):
    """One matrix of every expert, whatever form its parameter has."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]

    @nn.compact
    def __call__(self) -> Float[Array, "expert in out"] | PackedMatrix:
        """The parameter itself."""
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
            return kernel.unbox() if isinstance(kernel, nn.meta.AxisMetadata) else kernel
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        return self.param("kernel", nn.with_logical_partitioning(init, self.axes), self.shape)


def expert_hidden(
    x: Float[Array, "*row embed"],
    wide: Sequence[Float[Array, "embed mlp"]],
    activation: Callable[[Array], Array],
) -> Float[Array, "*row mlp"]:
    """What an expert's second matrix reads: `activation(x wi)`, or `activation(x wi_0) * (x wi_1)`."""
    hidden = activation(x @ wide[0])
    for gate in wide[1:]:
        hidden = hidden * (x @ gate)
    return hidden


def grouped_apply(
    function: Callable[..., Array],
    x: Float[Array, "token in"],
    expert: Int[Array, "token"],
    kernels: Sequence[Float[Array, "expert _ _"]],
) -> Float[Array, "token out"]:
    """`function(rows, *kernels of one expert)` on the rows of each expert, every row once, none dropped.

    Rows are sorted by expert and cut into blocks that belong to one expert each, so the work is `token` rows and at
    most one partly filled block an expert, whatever the load; shapes are static.
    """
    tokens, num_experts = x.shape[0], kernels[0].shape[0]
    lanes = min(128, 1 << max(tokens // num_experts - 1, 0).bit_length())
    blocks = group_tokens(expert, num_experts, lanes)

    def one_block(carry: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
        rows, index = inputs
        mine = (lax.dynamic_index_in_dim(kernel, index, keepdims=False).astype(x.dtype) for kernel in kernels)
        return carry, function(rows, *mine)

    _, out = lax.scan(one_block, None, (blocks.spread(x), blocks.expert))
    return blocks.collect(out)


def grouped_hidden(
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    wide: Sequence[Float[Array, "expert embed mlp"]],
    activation: Callable[[Array], Array],
) -> Float[Array, "token mlp"]:
    """`expert_hidden` of each token's own expert."""
    return grouped_apply(lambda rows, *mine: expert_hidden(rows, mine, activation), x, expert, wide)


def grouped_mlp(
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    wide: Sequence[Float[Array, "expert embed mlp"]],
    narrow: Float[Array, "expert mlp embed"],
    activation: Callable[[Array], Array],
) -> Float[Array, "token embed"]:
    """Each token through its own expert."""
    function = lambda rows, *mine: expert_hidden(rows, mine[:-1], activation) @ mine[-1]
    return grouped_apply(function, x, expert, (*wide, narrow))


def capacity_mlp(
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    kept: Bool[Array, "token"],
    capacity: int,
    wide: Sequence[Float[Array, "expert embed mlp"]],
    narrow: Float[Array, "expert mlp embed"],
    activation: Callable[[Array], Array],
) -> Float[Array, "token embed"]:
    """Tokens through buffers of `capacity` rows an expert: batched products, as training wants them.

    Rows that are not `kept`, or find the buffer full, come back as zeros.
    """
    num_experts = narrow.shape[0]
    chosen = jax.nn.one_hot(jnp.where(kept, expert, num_experts), num_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, axis=1)
    slot = jnp.where(kept & (place < capacity), expert * capacity + place, num_experts * capacity)
    slots = jnp.zeros((num_experts * capacity, x.shape[1]), x.dtype).at[slot].set(x, mode="drop")
    slots = slots.reshape(num_experts, capacity, -1)
    hidden = expert_hidden(slots, [kernel.astype(x.dtype) for kernel in wide], activation)
    out = (hidden @ narrow.astype(x.dtype)).reshape(num_experts * capacity, -1)
    return out.at[slot].get(mode="fill", fill_value=0)


class PlacedExperts(Protocol):
    """The experts of one layer, wherever they live: traceable, and itself a pytree."""

    def __call__(
        self,
        x: Float[Array, "token embed"],
        expert: Int[Array, "token"],
        scale: Float[Array, "token"],
        *,
        num_experts: int,
    ) -> Float[Array, "token embed"]:
        """Each token's expert output times `scale`."""
        ...


class Experts(nn.Module):
    """The experts of one layer."""

    config: SwitchConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        wide = lambda: ExpertKernel((c.num_experts, c.d_model, c.d_ff), ("expert", "embed", "expert_mlp"))
        if c.gated:
            self.wi_0, self.wi_1 = wide(), wide()
        else:
            self.wi = wide()
        self.wo = ExpertKernel((c.num_experts, c.d_ff, c.d_model), ("expert", "expert_mlp", "embed"))

    def __call__(
        self, x: Float[Array, "token embed"], routing: Routing, capacity: int | None = None
    ) -> Float[Array, "token embed"]:
        """Each token's expert output times the router's probability; a token not kept adds nothing.

        `capacity` bounds the tokens an expert can have been sent; with it, dense experts are batched products.
        """
        x = x.astype(self.dtype)
        scale = jnp.where(routing.kept, routing.probability, 0.0)
        if self.has_variable("params", "placed"):
            placed: PlacedExperts = self.get_variable("params", "placed")
            return placed(x, routing.expert, scale, num_experts=self.config.num_experts)
        wide = (self.wi_0(), self.wi_1()) if self.config.gated else (self.wi(),)
        narrow = self.wo()
        if isinstance(narrow, PackedMatrix):
            return packed_mlp(
                wide if self.config.gated else wide[0],
                narrow,
                x,
                routing.expert,
                scale=scale,
                activation=self.config.activation,
            )
        activation = ACTIVATIONS[self.config.activation]
        if capacity is None:
            out = grouped_mlp(x, routing.expert, wide, narrow, activation)
        else:
            out = capacity_mlp(x, routing.expert, routing.kept, capacity, wide, narrow, activation)
        return out * scale.astype(self.dtype)[:, None]


class SwitchMLP(nn.Module):
    """Router and experts of one layer."""

    config: SwitchConfig
    capacity: SequenceCapacity | GroupCapacity | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.router = Router(self.config.num_experts, self.capacity)
        self.expert = Experts(self.config, self.dtype)

    def route(self, x: Float[Array, "b n embed"]) -> Routing:
        """The router alone."""
        return self.router(x)

    def _bound(self, batch: int, length: int) -> int | None:
        """The most tokens an expert can be sent, where the rule gives one below `batch * length`."""
        if isinstance(self.capacity, SequenceCapacity):
            return self.capacity.tokens * batch if self.capacity.tokens < length else None
        if isinstance(self.capacity, GroupCapacity):
            size = self.capacity.group_size(batch * length, self.config.num_experts)
            groups = -(-batch * length // size)
            return groups * self.capacity.per_expert(size, self.config.num_experts)
        return None

    def __call__(self, x: Float[Array, "b n embed"]) -> Float[Array, "b n embed"]:
        """Route and compute."""
        routing = self.route(x)
        flat = Routing(*(part.reshape(-1) for part in routing))
        out = self.expert(x.reshape(-1, x.shape[-1]), flat, self._bound(*x.shape[:2])).reshape(x.shape)
        if isinstance(self.capacity, SequenceCapacity) and self.capacity.dropped == "input":
            passed = x.astype(self.dtype) * routing.probability.astype(self.dtype)[..., None]
            return jnp.where(routing.kept[..., None], out, passed)
        return out
