"""The product on a CPU, by the numba kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.cpu.ffi import HostFunction
from pallas_kernels.cpu.packed_arguments import packed_arrays, packed_from, packed_integers
from pallas_kernels.cpu.packed_product import packed_product, precompile
from pallas_kernels.cpu.token_blocks import TokenBlocks
from pallas_kernels.operands import PackedMatrix


def packed_matmul(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply like `pallas_kernels.packed_matmul`; tokens of one expert share a pass over its codewords."""
    precompile(packed)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    result = jax.ShapeDtypeStruct((x.shape[0], packed.rows), jnp.float32)
    operands = (*packed_arrays(packed), x.astype(jnp.float32), expert)
    return _multiply_on_host(result, *operands, **packed_integers(packed, "packed")).astype(x.dtype)


@HostFunction
def _multiply_on_host(*operands: np.ndarray, **integers: Any) -> None:
    *arrays, x, expert, y = operands
    packed, blocks = packed_from(arrays, integers, "packed"), TokenBlocks.by_expert(expert)
    blocks.combine(packed_product(packed, blocks, blocks.dispatch(x)), np.ones(len(x), np.float32), y)
