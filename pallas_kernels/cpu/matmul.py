"""Packed matrices times tokens, from jitted code."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.cpu.ffi import HostFunction
from pallas_kernels.cpu.packed_arguments import NUM_ARRAYS, packed_arrays, packed_from, packed_integers
from pallas_kernels.cpu.packed_product import packed_product, precompile
from pallas_kernels.cpu.token_blocks import expert_blocks, single_token_blocks
from pallas_kernels.operands import PackedMatrix


def multiply(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"], *, group: bool
) -> Float[Array, "t out"]:
    """Return `packed[expert_index[t]] @ x[t]`, summed in float32, in the dtype of `x`.

    With `group`, the tokens of an expert share a pass over its codewords, else each has its own. An `expert_index`
    that is out of range is clipped.
    """
    precompile(packed)
    result = jax.ShapeDtypeStruct((x.shape[0], packed.rows), jnp.float32)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    operands = (*packed_arrays(packed), x.astype(jnp.float32), expert)
    y = _multiply_on_host(result, *operands, group=int(group), **packed_integers(packed, "packed"))
    return y.astype(x.dtype)


@HostFunction
def _multiply_on_host(*operands: np.ndarray, group: int, **integers: Any) -> None:
    *arrays, x, expert, y = operands
    packed = packed_from(arrays[:NUM_ARRAYS], integers, "packed")
    blocks = expert_blocks(expert) if group else single_token_blocks(expert)
    blocks.combine(packed_product(packed, blocks, blocks.dispatch(x)), np.ones(len(x), np.float32), y)
