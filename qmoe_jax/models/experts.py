"""Feed-forward experts, dense or packed under the same parameter names.

A parameter `expert/wi/kernel` is either an array `[expert, in, out]`, as in T5X, or a `PackedMatrix`. Experts
that are not arrays of the program are computed by the parameter `expert/placed`. The parameters decide: one
stack may be dense and the other packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import PackedMatrix, packed_mlp
from pallas_kernels.matmul.epilogue import ACTIVATIONS
from pallas_kernels.matmul.grouping import group_tokens
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.layers import Dense
from qmoe_jax.models.router import GroupCapacity, Router, Routing, SequenceCapacity
from qmoe_jax.parameters import input_matrices


class DenseMLP(nn.Module):
    """Feed-forward part of a layer without experts."""

    config: SwitchConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n embed"]) -> Float[Array, "b n embed"]:
        """Return `activation(x wi) wo`, or `(activation(x wi_0) * (x wi_1)) wo` for gated models."""
        activation = ACTIVATIONS[self.config.activation]
        wi = [
            Dense(self.config.d_ff, ("embed", "mlp"), self.dtype, name=name)(x)
            for name in input_matrices(self.config)
        ]
        hidden = math.prod(wi[1:], start=activation(wi[0]))
        return Dense(self.config.d_model, ("mlp", "embed"), self.dtype, name="wo")(hidden)


class ExpertWeights(nn.Module):
    """One matrix of all experts, an array or packed."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]

    @nn.compact
    def __call__(self) -> Float[Array, "expert in out"] | PackedMatrix:
        """Return the parameter."""
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
            return kernel.unbox() if isinstance(kernel, nn.meta.AxisMetadata) else kernel
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        return self.param("kernel", nn.with_logical_partitioning(init, self.axes), self.shape)


def expert_hidden(
    x: Float[Array, "*row embed"],
    wi: Sequence[Float[Array, "embed mlp"]],
    activation: Callable[[Array], Array],
) -> Float[Array, "*row mlp"]:
    """Return an expert's hidden activations: `activation(x wi)`, or `activation(x wi_0) * (x wi_1)`."""
    hidden = activation(x @ wi[0])
    for gate in wi[1:]:
        hidden = hidden * (x @ gate)
    return hidden


def grouped_apply(
    function: Callable[..., Array],
    x: Float[Array, "token in"],
    expert: Int[Array, "token"],
    kernels: Sequence[Float[Array, "expert _ _"]],
) -> Float[Array, "token out"]:
    """Apply `function(rows, *matrices of one expert)` to the rows of each expert; no row is dropped.

    Rows are sorted by expert and split into blocks of one expert each, so that the work is `token` rows plus
    at most one partly filled block per expert, whatever the load. Shapes are static.
    """
    tokens, num_experts = x.shape[0], kernels[0].shape[0]
    lanes = min(128, 1 << max(tokens // num_experts - 1, 0).bit_length())
    blocks = group_tokens(expert, num_experts, lanes)

    def one_block(carry: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
        rows, index = inputs
        mine = (lax.dynamic_index_in_dim(kernel, index, keepdims=False).astype(x.dtype) for kernel in kernels)
        return carry, function(rows, *mine)

    _, out = lax.scan(one_block, None, (blocks.dispatch(x), blocks.expert))
    return blocks.combine(out)


def grouped_hidden(
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    wi: Sequence[Float[Array, "expert embed mlp"]],
    activation: Callable[[Array], Array],
) -> Float[Array, "token mlp"]:
    """Return the hidden activations of each token in its own expert."""
    return grouped_apply(lambda rows, *matrices: expert_hidden(rows, matrices, activation), x, expert, wi)


def grouped_mlp(
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    wi: Sequence[Float[Array, "expert embed mlp"]],
    wo: Float[Array, "expert mlp embed"],
    activation: Callable[[Array], Array],
) -> Float[Array, "token embed"]:
    """Return each token's expert output."""
    function = lambda rows, *matrices: expert_hidden(rows, matrices[:-1], activation) @ matrices[-1]
    return grouped_apply(function, x, expert, (*wi, wo))


def capacity_mlp(
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    kept: Bool[Array, "token"],
    capacity: int,
    wi: Sequence[Float[Array, "expert embed mlp"]],
    wo: Float[Array, "expert mlp embed"],
    activation: Callable[[Array], Array],
) -> Float[Array, "token embed"]:
    """Tokens through buffers of `capacity` rows an expert: batched products, as training wants them.

    Rows that are not `kept`, or find the buffer full, come back as zeros.
    """
    num_experts = wo.shape[0]
    chosen = jax.nn.one_hot(jnp.where(kept, expert, num_experts), num_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, axis=1)
    slot = jnp.where(kept & (place < capacity), expert * capacity + place, num_experts * capacity)
    slots = jnp.zeros((num_experts * capacity, x.shape[1]), x.dtype).at[slot].set(x, mode="drop")
    slots = slots.reshape(num_experts, capacity, -1)
    hidden = expert_hidden(slots, [kernel.astype(x.dtype) for kernel in wi], activation)
    out = (hidden @ wo.astype(x.dtype)).reshape(num_experts * capacity, -1)
    return out.at[slot].get(mode="fill", fill_value=0)


class PlacedExperts(Protocol):
    """The experts of one layer behind a call: traceable by jit, and itself a pytree."""

    def __call__(
        self,
        x: Float[Array, "token embed"],
        expert: Int[Array, "token"],
        scale: Float[Array, "token"],
        *,
        num_experts: int,
    ) -> Float[Array, "token embed"]:
        """Return each token's expert output times `scale`."""
        ...


class Experts(nn.Module):
    """The experts of one layer: dense, packed or placed."""

    config: SwitchConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        weights = lambda: ExpertWeights((c.num_experts, c.d_model, c.d_ff), ("expert", "embed", "expert_mlp"))
        if c.gated:
            self.wi_0, self.wi_1 = weights(), weights()
        else:
            self.wi = weights()
        self.wo = ExpertWeights((c.num_experts, c.d_ff, c.d_model), ("expert", "expert_mlp", "embed"))

    def __call__(
        self, x: Float[Array, "token embed"], routing: Routing, capacity: int | None = None
    ) -> Float[Array, "token embed"]:
        """Return each token's expert output times its router probability, zero for dropped tokens.

        `capacity` is an upper bound of the tokens per expert; given one, dense experts run as batched
        products.
        """
        x = x.astype(self.dtype)
        scale = jnp.where(routing.kept, routing.probability, 0.0)
        if self.has_variable("params", "placed"):
            placed: PlacedExperts = self.get_variable("params", "placed")
            return placed(x, routing.expert, scale, num_experts=self.config.num_experts)
        wi = (self.wi_0(), self.wi_1()) if self.config.gated else (self.wi(),)
        wo = self.wo()
        if isinstance(wo, PackedMatrix):
            return packed_mlp(
                wi if self.config.gated else wi[0],
                wo,
                x,
                routing.expert,
                scale=scale,
                activation=self.config.activation,
            )
        activation = ACTIVATIONS[self.config.activation]
        if capacity is None:
            out = grouped_mlp(x, routing.expert, wi, wo, activation)
        else:
            out = capacity_mlp(x, routing.expert, routing.kept, capacity, wi, wo, activation)
        return out * scale.astype(self.dtype)[:, None]


class SwitchMLP(nn.Module):
    """Feed-forward part with experts: router and experts of one layer."""

    config: SwitchConfig
    capacity: SequenceCapacity | GroupCapacity | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.router = Router(self.config.num_experts, self.capacity)
        self.expert = Experts(self.config, self.dtype)

    def route(self, x: Float[Array, "b n embed"]) -> Routing:
        """Return the routing of each token."""
        return self.router(x)

    def _max_tokens_per_expert(self, batch: int, length: int) -> int | None:
        """Return an upper bound of the tokens per expert if the rule gives one below `batch * length`."""
        if isinstance(self.capacity, SequenceCapacity):
            return self.capacity.tokens * batch if self.capacity.tokens < length else None
        if isinstance(self.capacity, GroupCapacity):
            size = self.capacity.group_size(batch * length, self.config.num_experts)
            groups = -(-batch * length // size)
            return groups * self.capacity.per_expert(size, self.config.num_experts)
        return None

    def __call__(self, x: Float[Array, "b n embed"]) -> Float[Array, "b n embed"]:
        """Route the tokens and run their experts."""
        routing = self.route(x)
        flat = Routing(*(part.reshape(-1) for part in routing))
        out = self.expert(
            x.reshape(-1, x.shape[-1]), flat, self._max_tokens_per_expert(*x.shape[:2])
        ).reshape(x.shape)
        if isinstance(self.capacity, SequenceCapacity) and self.capacity.dropped == "input":
            passed = x.astype(self.dtype) * routing.probability.astype(self.dtype)[..., None]
            return jnp.where(routing.kept[..., None], out, passed)
        return out
