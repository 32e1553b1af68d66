"""The dense product on a CPU by numba, which reads the matrix where it is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.cpu.dense_product import dense_product, precompile
from pallas_kernels.cpu.ffi import HostFunction


def dense_matmul(x: Float32[Array, "t in"], w: BFloat16[Array, "in out"]) -> Float32[Array, "t out"]:
    """Multiply as `pallas_kernels.dense_matmul` does."""
    _compile()
    return _on_host(jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32), x, w)


@HostFunction
def _on_host(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
    dense_product(w.view(np.uint16), x, y)


@functools.cache
def _compile() -> None:
    precompile()
