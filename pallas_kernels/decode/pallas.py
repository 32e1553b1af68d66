"""Pallas on a GPU: a warp clears a row, then scatters the nonzeros of its codewords."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.backend import triton_parameters
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import StreamReader, stream_operands

TILE = 128  # codewords at a time
CLEARED = 1024  # elements cleared at a time


def decode(
    packed: PackedMatrix, dtype: np.dtype, *, interpret: bool = False
) -> Float[Array, "expert out in"]:
    """See `pallas_kernels.unpack`."""
    return pl.pallas_call(
        functools.partial(_kernel, reader=StreamReader.of(packed, TILE), barrier=not interpret),
        grid=(packed.rows, packed.num_experts),
        out_shape=jax.ShapeDtypeStruct((packed.num_experts, packed.rows, packed.width), dtype),
        compiler_params=triton_parameters(num_warps=1),
        interpret=interpret,
        name="packed_decode",
    )(*stream_operands(packed), jnp.asarray(packed.levels))


def _kernel(*refs: Any, reader: StreamReader, barrier: bool) -> None:
    codes, offsets, entries, levels, y = refs
    row, expert = pl.program_id(0), pl.program_id(1)
    low, high = levels[expert, row, 0].astype(y.dtype), levels[expert, row, 1].astype(y.dtype)
    for start in range(0, reader.width, CLEARED):
        column = start + jnp.arange(CLEARED)
        zeros = jnp.zeros(CLEARED, y.dtype)
        plt.store(y.at[expert, row, column], zeros, mask=column < reader.width)
    if barrier:  # interpret mode has no rule for it, and runs in order anyway
        plt.debug_barrier()

    def visit(position: Array, digit: Array, carry: None) -> None:
        plt.store(y.at[expert, row, position], jnp.where(digit == 2, high, low), mask=digit != 0)

    reader.visit_row((codes, offsets, entries), expert, row, visit, None)
