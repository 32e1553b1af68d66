"""Pallas on a GPU: a thread takes a row through all columns of the block; threads share nothing.

The feedback of a panel stays in registers, its columns unrolled; the deviations of earlier panels are read
back from the output by the thread that wrote them (one row per thread leaves no other way to lay them out),
so no barrier is needed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import triton_parameters
from pallas_kernels.quantize_block.operands import BlockGrid, Columns, RoundedBlock
from pallas_kernels.tiles import multiply_add

WARPS = 4
ROWS = 32 * WARPS  # of a program: one per thread
PANEL = 16  # columns unrolled: twice as many take minutes to compile


def quantize_block(
    w: Columns,
    error_feedback: Columns,
    lower: Float[Array, "column column"],
    curvature: Float[Array, "column"],
    levels: Float[Array, "group out 2"],
    group_index: Int[Array, "column"],
    grid: BlockGrid,
    *,
    interpret: bool = False,
) -> RoundedBlock:
    """See `pallas_kernels.quantize_block`."""
    columns, out = w.shape
    numbers, structure = jax.tree.flatten(grid)
    results = pl.pallas_call(
        functools.partial(
            _kernel, panel=math.gcd(columns, PANEL), structure=structure, compiled=not interpret
        ),
        grid=(pl.cdiv(out, ROWS),),
        out_shape=(
            jax.ShapeDtypeStruct(w.shape, jnp.uint8),
            jax.ShapeDtypeStruct(w.shape, jnp.float32),
            jax.ShapeDtypeStruct((out,), jnp.float32),
        ),
        compiler_params=triton_parameters(num_warps=WARPS),
        interpret=interpret,
        name="quantize_block",
    )(
        w,
        error_feedback,
        lower,
        curvature,
        levels,
        group_index,
        *[jnp.reshape(number, 1) for number in numbers],
    )
    return RoundedBlock(*results)


def _kernel(*refs: Any, panel: int, structure: Any, compiled: bool) -> None:
    w, error_feedback, lower, curvature, levels, group_index, *numbers, digits, deviation, error = refs
    grid = jax.tree.unflatten(structure, [number[0] for number in numbers])
    rows = pl.program_id(0) * ROWS + jnp.arange(ROWS)
    live = rows < w.shape[1]
    load = functools.partial(plt.load, mask=live, other=0)
    add_product = functools.partial(multiply_add, compiled=compiled)

    def round_column(column: Any, feedback: Array, total: Array) -> tuple[Array, Array]:
        weight, cost, group = load(w.at[column, rows]), curvature[column], group_index[column]
        pair = load(levels.at[group, rows, 0]), load(levels.at[group, rows, 1])
        target = weight + feedback
        digit = grid.digit(target, pair, cost)
        value = grid.value(digit, pair)
        plt.store(digits.at[column, rows], digit, mask=live)
        plt.store(deviation.at[column, rows], weight - value, mask=live)
        return weight - value, total + cost * (target - value) ** 2

    def round_panel(p: Any, total: Array) -> Array:
        first = p * panel

        def add_earlier(column: Any, feedback: list[Array]) -> list[Array]:
            deviated = load(deviation.at[column, rows])
            return [add_product(deviated, lower[first + i, column], feedback[i]) for i in range(panel)]

        feedback = [load(error_feedback.at[first + i, rows]) for i in range(panel)]
        feedback = jax.lax.fori_loop(0, first, add_earlier, feedback)
        for i in range(panel):
            deviated, total = round_column(first + i, feedback[i], total)
            for j in range(i + 1, panel):
                feedback[j] = add_product(deviated, lower[first + j, first + i], feedback[j])
        return total

    total = jax.lax.fori_loop(0, w.shape[0] // panel, round_panel, jnp.zeros(ROWS, jnp.float32))
    plt.store(error.at[rows], total, mask=live)
