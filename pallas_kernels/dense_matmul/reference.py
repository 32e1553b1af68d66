"""The dense product in plain jax.numpy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32


def dense_matmul(x: Float32[Array, "t in"], w: BFloat16[Array, "in out"]) -> Float32[Array, "t out"]:
    """Multiply as `pallas_kernels.dense_matmul` does."""
    return jnp.dot(x, w.astype(jnp.float32), precision="highest")
