"""Attention of T5: unscaled logits, one relative position bias per stack, key-value caches for decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.layers import Dense

MASKED = -1e10
"""Added to masked logits, as in flaxformer: a query with all keys masked attends evenly and gives no NaN."""


def relative_position_bucket(
    distance: Int[Array, "*shape"], bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> Int[Array, "*shape"]:
    """Return the bucket of each distance (key position - query position).

    Small distances have a bucket each; larger ones share logarithmic buckets up to `max_distance`. The
    borders are integers computed in float64, so that they do not depend on a platform's logarithm; with 32
    buckets and a maximum of 128 they equal those of flaxformer and Hugging Face at every distance.
    """
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        offset = jnp.zeros_like(distance)
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    steps = np.arange(1, buckets - exact)
    borders = np.ceil(exact * (max_distance / exact) ** (steps / (buckets - exact)) - 1e-9)
    far = exact + jnp.searchsorted(jnp.asarray(borders, jnp.int32), distance, side="right")
    return offset + jnp.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
    """Relative position bias `rel_embedding` `[heads, bucket]`, one table for all layers of a stack."""

    num_heads: int
    bidirectional: bool
    buckets: int = 32
    max_distance: int = 128
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, queries: Int[Array, "query"], keys: Int[Array, "key"]
    ) -> Float[Array, "1 heads query key"]:
        """Return the bias between query and key positions."""
        init = nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"), ("heads", "relpos_buckets")
        )
        table = self.param("rel_embedding", init, (self.num_heads, self.buckets))
        bucket = relative_position_bucket(
            keys[None, :] - queries[:, None], self.bidirectional, self.buckets, self.max_distance
        )
        return table.astype(self.dtype)[None, :, bucket]


class Attention(nn.Module):
    """Multi-head attention over `num_heads * d_kv` features (head-major), not necessarily `features`."""

    features: int
    num_heads: int
    d_kv: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        inner = self.num_heads * self.d_kv
        # T5 folds the usual 1/sqrt(d_kv) of the logits into the query's initial scale.
        self.query = Dense(inner, ("embed", "joined_kv"), self.dtype, init_variance=1 / self.d_kv)
        self.key = Dense(inner, ("embed", "joined_kv"), self.dtype)
        self.value = Dense(inner, ("embed", "joined_kv"), self.dtype)
        self.out = Dense(self.features, ("joined_kv", "embed"), self.dtype)

    def _split(self, x: Float[Array, "b n joined"]) -> Float[Array, "b n heads kv"]:
        return x.reshape(*x.shape[:2], self.num_heads, self.d_kv)

    def _attend(
        self,
        q: Float[Array, "b m heads kv"],
        k: Float[Array, "b n heads kv"],
        v: Float[Array, "b n heads kv"],
        bias: Float[Array, "#b #heads #m #n"],
    ) -> Float[Array, "b m embed"]:
        logits = jnp.einsum("bmhd,bnhd->bhmn", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias.astype(jnp.float32), axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhmn,bnhd->bmhd", weights, v)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))

    def __call__(
        self,
        x: Float[Array, "b m embed"],
        memory: Float[Array, "b n embed"],
        bias: Float[Array, "#b #heads #m #n"],
    ) -> Float[Array, "b m embed"]:
        """Attend from `x` to `memory`; masks are part of `bias`."""
        return self._attend(
            self._split(self.query(x)), self._split(self.key(memory)), self._split(self.value(memory)), bias
        )

    def step(
        self,
        x: Float[Array, "b 1 embed"],
        position: Int[Array, ""],
        length: int,
        bias: Float[Array, "#b #heads 1 n"],
    ) -> Float[Array, "b 1 embed"]:
        """Attend from the token at `position` to it and earlier ones, cached in the collection "cache"."""
        empty = jnp.zeros((x.shape[0], length, self.num_heads, self.d_kv), self.dtype)
        keys, values = self.get_variable("cache", "key", empty), self.get_variable("cache", "value", empty)
        keys = lax.dynamic_update_slice_in_dim(keys, self._split(self.key(x)), position, 1)
        values = lax.dynamic_update_slice_in_dim(values, self._split(self.value(x)), position, 1)
        self.put_variable("cache", "key", keys)
        self.put_variable("cache", "value", values)
        return self._attend(self._split(self.query(x)), keys, values, bias)

    def cross_step(
        self,
        x: Float[Array, "b 1 embed"],
        memory: Float[Array, "b n embed"],
        bias: Float[Array, "#b #heads 1 n"],
    ) -> Float[Array, "b 1 embed"]:
        """Attend from one token to `memory`, whose keys and values are computed in the first step only."""
        if not self.has_variable("cache", "key"):
            self.put_variable("cache", "key", self._split(self.key(memory)))
            self.put_variable("cache", "value", self._split(self.value(memory)))
        keys, values = self.get_variable("cache", "key"), self.get_variable("cache", "value")
        return self._attend(self._split(self.query(x)), keys, values, bias)


def padding_bias(mask: Bool[Array, "b n"]) -> Float[Array, "b 1 1 n"]:
    """Return a bias, float32, that masks the keys where `mask` is False."""
    return _masked(mask)[:, None, None, :]


def causal_bias(queries: Int[Array, "query"], keys: Int[Array, "key"]) -> Float[Array, "1 1 query key"]:
    """Return a bias, float32, that masks keys after the query."""
    return _masked(keys[None, :] <= queries[:, None])[None, None]


def _masked(mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(mask, jnp.float32(0), jnp.float32(MASKED))
