"""An expert on a CPU by the numba kernels: one host call, whose activations stay in blocks of tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.cpu.ffi import HostFunction
from pallas_kernels.cpu.mlp import expert_mlp
from pallas_kernels.cpu.packed_arguments import NUM_ARRAYS, packed_arrays, packed_from, packed_integers
from pallas_kernels.cpu.packed_product import precompile
from pallas_kernels.operands import PackedMatrix

_NAMES = ("wi", "gate")


def packed_mlp(
    wi: tuple[PackedMatrix, ...],
    wo: PackedMatrix,
    x: Float[Array, "t d_model"],
    expert_index: Int32[Array, "t"],
    scale: Float[Array, "t"],
    *,
    activation: str,
) -> Float[Array, "t d_model"]:
    """Compute `pallas_kernels.packed_mlp`; activations between two products are float32."""
    arrays, integers = list(packed_arrays(wo)), packed_integers(wo, "wo")
    for name, matrix in zip(_NAMES, wi, strict=False):
        arrays += packed_arrays(matrix)
        integers |= packed_integers(matrix, name)
    for matrix in (*wi, wo):
        precompile(matrix)
    expert = jnp.clip(expert_index, 0, wo.num_experts - 1)
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    operands = (*arrays, x.astype(jnp.float32), expert, scale)
    return _mlp_on_host(result, *operands, activation=activation, **integers).astype(x.dtype)


@HostFunction
def _mlp_on_host(*operands: np.ndarray, activation: str, **integers: Any) -> None:
    *arrays, x, expert, scale, y = operands
    matrices = [
        packed_from(arrays[i * NUM_ARRAYS :][:NUM_ARRAYS], integers, name)
        for i, name in enumerate(("wo", *_NAMES)[: len(arrays) // NUM_ARRAYS])
    ]
    wo, *wi = matrices
    expert_mlp(tuple(wi), wo, x, expert, scale, y, activation=activation)
