"""Switch router: top-1 routing in float32, expert capacity by each rule in use, auxiliary losses."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.layers import Dense


@dataclasses.dataclass(frozen=True)
class SequenceCapacity:
    """Capacity rule of Hugging Face: each sequence sends an expert at most `tokens` tokens, in order.

    Attributes:
        tokens: capacity per sequence and expert.
        dropped: output of a token beyond the capacity: "zero" (transformers 4.52, and 5.18 or later), or
            "input", its normalized input times the router probability (transformers up to 4.51).
    """

    tokens: int
    dropped: Literal["zero", "input"] = "zero"

    def __post_init__(self) -> None:
        """Check the values. Raises `ValueError` for one that is out of range."""
        if not self.tokens >= 0:
            raise ValueError(f"tokens: expected at least 0, found {self.tokens}")
        if self.dropped not in ("zero", "input"):
            raise ValueError(f"dropped: expected 'zero' or 'input', found {self.dropped!r}")


@dataclasses.dataclass(frozen=True)
class GroupCapacity:
    """Capacity rule of flaxformer: the flattened batch is split into groups with a capacity per expert each.

    In each group an expert takes `max(round(factor * tokens / experts), minimum)` tokens, in order; the
    output of further tokens is zero.

    Attributes:
        factor: capacity factor.
        minimum: least capacity per group and expert.
        max_group_size: upper bound of the tokens per group.
        replicas: number of data-parallel replicas of an expert partition.
    """

    factor: float
    minimum: int = 4
    max_group_size: int = 8192
    replicas: int = 1

    def __post_init__(self) -> None:
        """Check the values. Raises `ValueError` for one that is out of range."""
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor: expected a finite number above 0, found {self.factor}")
        for name, least in {"minimum": 0, "max_group_size": 1, "replicas": 1}.items():
            if not (value := getattr(self, name)) >= least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")

    def group_size(self, tokens: int, num_experts: int) -> int:
        """Return the tokens per group.

        The number of groups is the smallest that divides `tokens` and is a multiple of experts * replicas;
        `tokens` is first rounded up to such a multiple, as flaxformer pads.
        """
        shards = num_experts * self.replicas
        tokens = -(-tokens // shards) * shards
        groups = max(tokens // self.max_group_size, shards)
        while tokens % groups or groups % shards:
            groups += 1
        return tokens // groups

    def per_expert(self, tokens: int, num_experts: int) -> int:
        """Return the capacity of an expert in a group of `tokens`."""
        return max(round(self.factor * tokens / num_experts), self.minimum)


CapacityRule = SequenceCapacity | GroupCapacity


class Routing(NamedTuple):
    """Routing of each token: expert, router probability, and whether it is within the expert's capacity."""

    expert: Int[Array, "*token"]
    probability: Float[Array, "*token"]
    kept: Bool[Array, "*token"]


def position_in_expert(expert: Int[Array, "group token"], num_experts: int) -> Int[Array, "group token"]:
    """Return the number of earlier tokens of the group that chose the same expert."""
    chosen = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)
    return jnp.take_along_axis(jnp.cumsum(chosen, 1) - 1, expert[..., None], 2)[..., 0]


def within_capacity(
    expert: Int[Array, "b n"], num_experts: int, rule: CapacityRule | None
) -> Bool[Array, "b n"]:
    """Return which tokens are within their expert's capacity under `rule`; all of them if it is None."""
    if rule is None:
        return jnp.ones(expert.shape, bool)
    if isinstance(rule, SequenceCapacity):
        return position_in_expert(expert, num_experts) < rule.tokens
    size = rule.group_size(expert.size, num_experts)
    flat = jnp.pad(expert.reshape(-1), (0, -expert.size % size))
    kept = position_in_expert(flat.reshape(-1, size), num_experts) < rule.per_expert(size, num_experts)
    return kept.reshape(-1)[: expert.size].reshape(expert.shape)


class RouterWeights(nn.Module):
    """Linear part of the router, a module because T5X names its parameter `router_weights/w/kernel`."""

    num_experts: int

    def setup(self) -> None:
        self.w = Dense(self.num_experts, ("embed", "unmodeled"), jnp.float32)

    def __call__(self, x: Float[Array, "*token embed"]) -> Float[Array, "*token expert"]:
        """Return router logits, float32."""
        return self.w(x)


class Router(nn.Module):
    """Top-1 routing in float32, without jitter."""

    num_experts: int
    capacity: CapacityRule | None = None

    def setup(self) -> None:
        self.router_weights = RouterWeights(self.num_experts)

    def __call__(self, x: Float[Array, "b n embed"]) -> Routing:
        """Choose an expert per token; sows "router_logits" into the collection "intermediates"."""
        logits = self.router_weights(x)
        self.sow("intermediates", "router_logits", logits)
        probabilities = jax.nn.softmax(logits, axis=-1)
        expert = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
        return Routing(
            expert, jnp.max(probabilities, axis=-1), within_capacity(expert, self.num_experts, self.capacity)
        )


def load_balancing_loss(logits: Float[Array, "group token expert"]) -> Float[Array, ""]:
    """Return the load-balancing loss (Switch Transformer, eq. 4), averaged over groups.

    It is experts * sum over experts of (share of tokens * mean router probability).
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    num_experts = logits.shape[-1]
    chosen = jax.nn.one_hot(jnp.argmax(logits, -1), num_experts, dtype=logits.dtype)
    return num_experts * jnp.mean(jnp.sum(chosen.mean(1) * probabilities.mean(1), axis=-1))


def router_z_loss(logits: Float[Array, "*token expert"]) -> Float[Array, ""]:
    """Return the mean squared log-partition function of the router (ST-MoE, eq. 5)."""
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
