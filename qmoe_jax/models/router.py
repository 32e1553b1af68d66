"""The Switch router: top-1 in float32, expert capacity in each of the three meanings in use, auxiliary losses."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
from flax import linen as nn
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from qmoe_jax.models.layers import Kernel


@dataclasses.dataclass(frozen=True)
class SequenceCapacity:
    """Hugging Face's rule: each sequence sends an expert at most `tokens` tokens, first come first served.

    A token over it adds nothing ("zero": transformers 4.52 and 5.18 or later) or its normalized input times the
    router's probability ("input": transformers up to 4.51).
    """

    tokens: int
    dropped: Literal["zero", "input"] = "zero"


@dataclasses.dataclass(frozen=True)
class GroupCapacity:
    """flaxformer's rule: the flattened batch is cut in groups of at most `max_group_size` tokens.

    In each group an expert takes `max(round(factor * tokens / experts), minimum)` tokens, first come first served;
    a token over it adds nothing. `replicas` is the number of data-parallel replicas an expert partition has.
    """

    factor: float
    minimum: int = 4
    max_group_size: int = 8192
    replicas: int = 1

    def group_size(self, tokens: int, num_experts: int) -> int:
        """Tokens a group: the number of groups is the smallest that divides `tokens`, and that experts divide.

        `tokens` is first rounded up to a multiple of experts * replicas, as flaxformer pads.
        """
        shards = num_experts * self.replicas
        tokens = -(-tokens // shards) * shards
        groups = max(tokens // self.max_group_size, shards)
        while tokens % groups or groups % shards:
            groups += 1
        return tokens // groups

    def per_expert(self, tokens: int, num_experts: int) -> int:
        """Tokens an expert takes of a group of `tokens`."""
        return max(round(self.factor * tokens / num_experts), self.minimum)


CapacityRule = SequenceCapacity | GroupCapacity


class Routing(NamedTuple):
    """The router's choice for each token: expert, its probability, and whether the expert has room."""

    expert: Int[Array, "*token"]
    probability: Float[Array, "*token"]
    kept: Bool[Array, "*token"]


def position_in_expert(expert: Int[Array, "group token"], num_experts: int) -> Int[Array, "group token"]:
    """How many earlier tokens of the group chose the same expert."""
    chosen = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)
    return jnp.take_along_axis(jnp.cumsum(chosen, 1) - 1, expert[..., None], 2)[..., 0]


def within_capacity(
    expert: Int[Array, "b n"], num_experts: int, rule: CapacityRule | None
) -> Bool[Array, "b n"]:
    """Which tokens find room at their expert under `rule`; all of them without one."""
    if rule is None:
        return jnp.ones(expert.shape, bool)
    if isinstance(rule, SequenceCapacity):
        return position_in_expert(expert, num_experts) < rule.tokens
    size = rule.group_size(expert.size, num_experts)
    flat = jnp.pad(expert.reshape(-1), (0, -expert.size % size))
    kept = position_in_expert(flat.reshape(-1, size), num_experts) < rule.per_expert(size, num_experts)
    return kept.reshape(-1)[: expert.size].reshape(expert.shape)


class RouterWeights(nn.Module):
    """The linear part; a module of its own because T5X stores it as `router_weights/w/kernel`."""

    num_experts: int

    def setup(self) -> None:
        self.w = Kernel(self.num_experts, ("embed", "unmodeled"), jnp.float32)

    def __call__(self, x: Float[Array, "*token embed"]) -> Float[Array, "*token expert"]:
        """Router logits, float32."""
        return self.w(x)


class Router(nn.Module):
    """Top-1 routing in float32, without jitter."""

    num_experts: int
    capacity: CapacityRule | None = None

    def setup(self) -> None:
        self.router_weights = RouterWeights(self.num_experts)

    def __call__(self, x: Float[Array, "b n embed"]) -> Routing:
        """Choose an expert for each token; "router_logits" is sown among the intermediates."""
        logits = self.router_weights(x)
        self.sow("intermediates", "router_logits", logits)
        probabilities = jax.nn.softmax(logits, axis=-1)
        expert = jnp.argmax(probabilities, axis=-1)
        return Routing(
            expert, jnp.max(probabilities, axis=-1), within_capacity(expert, self.num_experts, self.capacity)
        )


def load_balancing_loss(logits: Float[Array, "group token expert"]) -> Float[Array, ""]:
    """Experts * sum over experts of (share of tokens x mean probability), averaged over groups (Switch, eq. 4)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    num_experts = logits.shape[-1]
    chosen = jax.nn.one_hot(jnp.argmax(logits, -1), num_experts)
    return num_experts * jnp.mean(jnp.sum(chosen.mean(1) * probabilities.mean(1), axis=-1))


def router_z_loss(logits: Float[Array, "*token expert"]) -> Float[Array, ""]:
    """Mean squared log-partition (ST-MoE, eq. 5)."""
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
