"""The plain layers of T5: a matrix, the RMS norm, the token embedding."""

from __future__ import annotations

from flax import linen as nn
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.backend import platform
from pallas_kernels.dense_matmul import dense_matmul

FEW_TOKENS = 32
"""Up to as many, a CPU multiplies by a kernel in bfloat16 sooner than XLA, which widens it into memory first."""


class Kernel(nn.Module):
    """A matrix without bias, `kernel` `[in, out]`, with the logical axes T5X names.

    It is initialized with variance `init_variance / in`.
    """

    features: int
    axes: tuple[str, str]
    dtype: DTypeLike = jnp.float32
    init_variance: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiply in `dtype`.

        A kernel kept in bfloat16 for a computation in float32 is widened as it is read, where tokens are so few that
        reading it is what takes the time.
        """
        init = nn.initializers.variance_scaling(self.init_variance, "fan_in", "truncated_normal")
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), (x.shape[-1], self.features)
        )
        x = x.astype(self.dtype)
        if _better_narrow(x, kernel):
            rows = dense_matmul(x.reshape(-1, x.shape[-1]), kernel)
            return rows.reshape(*x.shape[:-1], self.features)
        return x @ kernel.astype(self.dtype)


def _better_narrow(x: Array, kernel: Array) -> bool:
    few = x.size // x.shape[-1] <= FEW_TOKENS
    return (x.dtype, kernel.dtype) == (jnp.float32, jnp.bfloat16) and few and platform() == "cpu"


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; statistics in float32, the product with `scale` in `dtype`."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Divide by the root of the mean square."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Embedding(nn.Module):
    """Token embedding `[vocab, embed]`, shared by both stacks, and the logits of tied models."""

    vocab_size: int
    features: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """Look tokens up. An id beyond the vocabulary gives NaN, never another token's row."""
        rows = jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(self.dtype)

    def attend(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Logits against the embedding, scaled by `features ** -0.5`, in float32."""
        table = self.embedding.astype(self.dtype)
        logits = jnp.matmul(x.astype(self.dtype), table.T, preferred_element_type=jnp.float32)
        return logits * self.features**-0.5
