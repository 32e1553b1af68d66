"""A grouped bfloat16 product of dense experts on tensor cores, to compare packed products with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.backend import triton_parameters
from pallas_kernels.matmul.grouping import group_tokens

ROWS, COLUMNS = 64, 32  # of weights per program, and per step; COLUMNS divides every width here


def grouped_product(weights: Any, x: Any, expert_index: Any, *, lanes: int, interpret: bool) -> Any:
    """Return `y[t] = weights[expert_index[t]] @ x[t]`.

    Args:
        weights: bfloat16 [expert, out, in]; `in` is a multiple of 32.
        x: bfloat16 [t, in].
        expert_index: int32 [t].
        lanes: tokens per block.
        interpret: whether Pallas interprets the kernel, on any device.
    """
    experts, rows, width = weights.shape
    blocks = group_tokens(expert_index, experts, lanes)
    y = pl.pallas_call(
        functools.partial(_kernel, steps=width // COLUMNS),
        grid=(pl.cdiv(rows, ROWS), blocks.count),
        out_shape=jax.ShapeDtypeStruct((blocks.count, lanes, rows), x.dtype),
        compiler_params=triton_parameters(num_warps=4, num_stages=3),
        interpret=interpret,
        name="dense_grouped_product",
    )(weights, blocks.expert, blocks.dispatch(x))
    return blocks.combine(y)


def _kernel(weights: Any, experts: Any, x: Any, y: Any, *, steps: int) -> None:
    block = pl.program_id(1)
    expert = experts[block]
    row = pl.program_id(0) * ROWS + jnp.arange(ROWS)
    lane = jnp.arange(x.shape[1])
    inside = row < weights.shape[1]

    @pl.when(expert >= 0)
    def _() -> None:
        def step(i: Any, total: Any) -> Any:
            column = i * COLUMNS + jnp.arange(COLUMNS)
            mask = jnp.broadcast_to(inside[:, None], (ROWS, COLUMNS))
            tile = plt.load(weights.at[expert, row[:, None], column[None, :]], mask=mask, other=0)
            tokens = plt.load(x.at[block, lane[:, None], column[None, :]])
            return total + jnp.dot(tokens, tile.T, preferred_element_type=jnp.float32)

        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((x.shape[1], ROWS), jnp.float32))
        mask = jnp.broadcast_to(inside[None, :], total.shape)
        plt.store(y.at[block, lane[:, None], row[None, :]], total.astype(y.dtype), mask=mask)
