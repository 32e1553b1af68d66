"""Packed experts times tokens on a CPU, from jitted code."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.cpu.ffi import HostFunction
from pallas_kernels.cpu.operands import NUM_ARRAYS, arrays_of, integers_of, rebuilt
from pallas_kernels.cpu.product import compile_for, product
from pallas_kernels.cpu.token_blocks import grouped, one_token_each
from pallas_kernels.operands import PackedMatrix


def multiply(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"], *, group: bool
) -> Float[Array, "t out"]:
    """`packed[expert_index[t]] @ x[t]`; with `group`, tokens of an expert share a pass over its codewords."""
    compile_for(packed)
    result = jax.ShapeDtypeStruct((x.shape[0], packed.rows), jnp.float32)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    operands = (*arrays_of(packed), x.astype(jnp.float32), expert)
    y = _multiply_on_host(result, *operands, group=int(group), **integers_of(packed, "packed"))
    return y.astype(x.dtype)


@HostFunction
def _multiply_on_host(*operands: np.ndarray, group: int, **integers: Any) -> None:
    *arrays, x, expert, y = operands
    packed = rebuilt(arrays[:NUM_ARRAYS], integers, "packed")
    blocks = grouped(expert) if group else one_token_each(expert)
    blocks.collect(product(packed, blocks, blocks.spread(x)), np.ones(len(x), np.float32), y)
