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

from pallas_kernels import tuning
from pallas_kernels.backend import triton_parameters
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import Streams

CLEARED = 1024  # elements cleared at a time


def unpack(
    packed: PackedMatrix,
    dtype: np.dtype,
    *,
    config: tuning.DecodeConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "expert out in"]:
    """See `pallas_kernels.unpack`."""
    config = tuning.choose(tuning.Problem.of("decode", packed, dtype), config)
    return pl.pallas_call(
        functools.partial(_kernel, tile=config.tile, barrier=not interpret),
        grid=(packed.rows, packed.num_experts),
        out_shape=jax.ShapeDtypeStruct((packed.num_experts, packed.rows, packed.width), dtype),
        compiler_params=triton_parameters(num_warps=config.warps),
        interpret=interpret,
        name="unpack",
    )(Streams.of(packed))


def _kernel(streams: Streams, y: Any, *, tile: int, barrier: bool) -> None:
    row, expert = pl.program_id(0), pl.program_id(1)
    low, high = (level.astype(y.dtype) for level in streams.level_pair(expert, row))
    for start in range(0, streams.width, CLEARED):
        column = start + jnp.arange(CLEARED)
        zeros = jnp.zeros(CLEARED, y.dtype)
        plt.store(y.at[expert, row, column], zeros, mask=column < streams.width)
    if barrier:  # interpret mode has no rule for it, and runs in order anyway
        plt.debug_barrier()

    def visit(position: Array, digit: Array, carry: None) -> None:
        plt.store(y.at[expert, row, position], jnp.where(digit == 2, high, low), mask=digit != 0)

    streams.visit(expert, row, tile, visit, None)
