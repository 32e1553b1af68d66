"""Plain layers of T5: dense layer, RMS norm, token embedding."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import platform
from pallas_kernels.dense_matmul import dense_matmul

FEW_TOKENS = 32
"""Number of tokens up to which, on a CPU, a product that widens bfloat16 weights as it reads them beats XLA,
which first widens them in memory."""


class Dense(nn.Module):
    """Dense layer without bias: `x @ kernel`, with parameter `kernel` `[in, out]` initialized as T5X does.

    Attributes:
        features: size of the output axis.
        axes: logical names of the axes, as in T5X.
        dtype: dtype of the computation.
        init_variance: variance of the initial values times the input size.
    """

    features: int
    axes: tuple[str, str]
    dtype: DTypeLike = jnp.float32
    init_variance: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiply in `dtype`.

        A kernel stored in bfloat16 is widened to float32 as it is read where tokens are so few that reading
        it dominates.
        """
        init = nn.initializers.variance_scaling(self.init_variance, "fan_in", "truncated_normal")
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), (x.shape[-1], self.features)
        )
        x = x.astype(self.dtype)
        if _widen_while_reading(x, kernel):
            rows = dense_matmul(x.reshape(-1, x.shape[-1]), kernel)
            return rows.reshape(*x.shape[:-1], self.features)
        return x @ kernel.astype(self.dtype)


def _widen_while_reading(x: Array, kernel: Array) -> bool:
    few = x.size // x.shape[-1] <= FEW_TOKENS
    return (x.dtype, kernel.dtype) == (jnp.float32, jnp.bfloat16) and few and platform() == "cpu"


class RMSNorm(nn.Module):
    """Layer norm of T5, without mean and bias; statistics in float32, the product with `scale` in `dtype`."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Divide by the root mean square and multiply by `scale`; NaN, not zeros, where squares overflow."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, (x.shape[-1],))
        x = x.astype(jnp.float32)
        factor = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        x = x * jnp.where(factor > 0, factor, jnp.float32(jnp.nan))
        return x.astype(self.dtype) * jnp.broadcast_to(scale.astype(self.dtype), x.shape)


class Embedding(nn.Module):
    """Token embedding `[vocab, embed]`, shared by both stacks; also the output projection of tied models."""

    vocab_size: int
    features: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """Return the rows of `tokens`; an id outside the vocabulary gives NaN, never another token's row."""
        rows = jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(self.dtype)

    def attend(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Return logits against the embedding, scaled by `features ** -0.5`, in float32."""
        table = self.embedding.astype(self.dtype)
        logits = jnp.matmul(x.astype(self.dtype), table.T, preferred_element_type=jnp.float32)
        return logits * self.features**-0.5
