"""Pallas on a GPU: a warp decodes one row for one token, whose expert it reads on the device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels.backend import triton_parameters
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import StreamReader, stream_operands

TILE = 128  # codewords a warp takes at a time: four a thread, 51 registers


def matvec(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """See `packed_matvec`."""
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    if x.shape[0] == 0:
        return jnp.zeros((0, packed.rows), x.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, reader=StreamReader.of(packed, TILE)),
        grid=(packed.rows, x.shape[0]),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], packed.rows), x.dtype),
        compiler_params=triton_parameters(num_warps=1),
        interpret=interpret,
        name="packed_matvec",
    )(*stream_operands(packed), jnp.asarray(packed.levels), expert, x)


def _kernel(*refs: Any, reader: StreamReader) -> None:
    codes, offsets, entries, levels, experts, x, y = refs
    row, token = pl.program_id(0), pl.program_id(1)
    expert = experts[token]
    low, high = levels[expert, row, 0].astype(jnp.float32), levels[expert, row, 1].astype(jnp.float32)

    def visit(position: Array, digit: Array, total: Array) -> Array:
        value = plt.load(x.at[token, position], mask=digit != 0, other=0).astype(jnp.float32)
        return total + value * jnp.where(digit == 2, high, low)

    total = reader.visit_row(
        (codes, offsets, entries), expert, row, visit, jnp.zeros(reader.tile, jnp.float32)
    )
    y[token, row] = jnp.sum(total).astype(y.dtype)
