"""Pallas on a GPU: a warp decodes one row once for a block of tokens of one expert."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels.backend import triton_parameters
from pallas_kernels.grouping import group_tokens
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import StreamReader, stream_operands

TILE = 32  # codewords at a time; with eight tokens each a thread holds eight sums, 48 registers
LANES = 8  # tokens of a block: a codeword's position is then one load of 16 or 32 bytes


def matmul(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """See `packed_matmul`."""
    if x.shape[0] == 0:
        return jnp.zeros((0, packed.rows), x.dtype)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    groups = group_tokens(expert, packed.num_experts, LANES)
    blocks = groups.expert.shape[0]
    y = pl.pallas_call(
        functools.partial(_kernel, reader=StreamReader.of(packed, TILE)),
        grid=(packed.rows, blocks),
        out_shape=jax.ShapeDtypeStruct((blocks, packed.rows, LANES), x.dtype),
        compiler_params=triton_parameters(num_warps=1),
        interpret=interpret,
        name="packed_matmul",
    )(
        *stream_operands(packed),
        jnp.asarray(packed.levels),
        groups.expert,
        groups.spread(x).transpose(0, 2, 1),  # tokens side by side
    )
    return groups.collect(y.transpose(0, 2, 1))


def _kernel(*refs: Any, reader: StreamReader) -> None:
    codes, offsets, entries, levels, experts, x, y = refs
    row, block = pl.program_id(0), pl.program_id(1)
    expert = experts[block]

    @pl.when(expert >= 0)
    def _() -> None:
        low, high = levels[expert, row, 0].astype(jnp.float32), levels[expert, row, 1].astype(jnp.float32)
        lane = jnp.arange(LANES)[None, :]

        def visit(position: Array, digit: Array, total: Array) -> Array:
            there = (digit != 0)[:, None]
            value = plt.load(x.at[block, position[:, None], lane], mask=there, other=0).astype(jnp.float32)
            return total + value * jnp.where(digit == 2, high, low)[:, None]

        total = jnp.zeros((reader.tile, LANES), jnp.float32)
        total = reader.visit_row((codes, offsets, entries), expert, row, visit, total)
        plt.store(y.at[block, row, pl.ds(0, LANES)], jnp.sum(total, axis=0).astype(y.dtype))
