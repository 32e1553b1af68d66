"""The Pallas kernel for many tokens per expert: rows are decoded to dense digits once, then multiplied.

Programs take turns at (expert, block of rows), for experts that have tokens. A program decodes its rows into
a slice of scratch memory that it overwrites at its next turn, so that the scratch fits the L2 cache whatever
the number of experts, and multiplies it by all token blocks of the expert on the tensor cores. The scratch
holds digits of one byte, half the bytes of bfloat16 weights; they become weights in registers, on their way
into the product.

All factors are bfloat16 and exact; sums are float32. Tokens in float32 are split into a sum of three
bfloat16. Levels in float32 do not fit a bfloat16: the minima and the maxima are then summed separately, with
weights 1, and the levels multiply the two sums.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Float, Float32

from pallas_kernels import tuning
from pallas_kernels.backend import triton_parameters
from pallas_kernels.matmul.epilogue import Epilogue
from pallas_kernels.matmul.grouping import TokenBlocks
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import PackedRefs

HIGH_HALF = -(1 << 16)  # of a float32's bits: the bfloat16 next to it towards zero


@dataclasses.dataclass(frozen=True)
class Config(tuning.Config):
    """A launch of `programs` programs that take turns at blocks of `rows` rows of an expert.

    Each decodes its rows, `tile` codewords of each at a time, then multiplies them by `lanes` tokens at a
    time, `columns` columns per step, with `warps` warps and `stages` loads in flight.
    """

    kind: ClassVar[str] = "tensor_core"

    rows: int
    tile: int
    lanes: int
    columns: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def heuristic(cls, problem: tuning.Problem) -> Config:
        """Return 64 rows, as the widest instructions need; tokens in float32 take three times the registers.

        Few columns, codewords and stages at a time: the hidden activations of an expert are float32 even
        where tokens are bfloat16, and with more of them registers spill on an H100 or an A100 (compiled for
        both, not measured).
        """
        lanes = lambda most: min(max(16, problem.tokens_per_expert), most)
        common = functools.partial(cls, rows=64, columns=32, programs=264)
        if problem.dtype == "float32":
            return common(lanes=lanes(64), tile=32, warps=4, stages=3)
        return common(lanes=lanes(128), tile=16, warps=4 if problem.tokens_per_expert < 64 else 8, stages=2)


def product(
    packed: PackedMatrix,
    x: Float[Array, "block lanes in"],
    blocks: TokenBlocks,
    epilogue: Epilogue,
    dtype: Any,
    *,
    config: Config,
    interpret: bool = False,
) -> Float[Array, "block lanes out"]:
    """Multiply in `dtype`, with an epilogue whose gate is [block, lanes, out] and scale [block, lanes].

    Blocks of expert -1 are not written.
    """
    busy, num_busy = blocks.busy_experts()
    programs = min(config.programs, busy.shape[0] * pl.cdiv(packed.rows, config.rows))
    padded_width = pl.cdiv(packed.width, config.columns) * config.columns
    y, _ = pl.pallas_call(
        functools.partial(_kernel, config=config, compiled=not interpret),
        grid=(programs,),
        out_shape=(
            jax.ShapeDtypeStruct((blocks.count, config.lanes, packed.rows), dtype),
            jax.ShapeDtypeStruct((programs, config.rows, padded_width), jnp.int8),
        ),
        compiler_params=triton_parameters(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="packed_matmul_tensor_core",
    )(PackedRefs.of(packed), busy, num_busy, blocks.bounds, x, epilogue)
    return y


def _kernel(
    packed: PackedRefs,
    busy: Any,
    num_busy: Any,
    bounds: Any,
    x: Any,
    epilogue: Epilogue,
    y: Any,
    scratch: Any,
    *,
    config: Config,
    compiled: bool,
) -> None:
    program, programs = pl.program_id(0), scratch.shape[0]
    blocks_of_rows = pl.cdiv(packed.rows, config.rows)
    turns = pl.cdiv(num_busy[0] * blocks_of_rows - program, programs)

    def turn(i: Array, carry: None) -> None:
        item = program + i * programs
        expert = busy[item // blocks_of_rows]
        row = item % blocks_of_rows * config.rows + jnp.arange(config.rows)
        _decode(packed, expert, row, scratch, program, config=config, compiled=compiled)

        inside = row < packed.rows
        levels = packed.level_pair(expert, row, inside)

        def multiply(block: Array, carry: None) -> None:
            total = _sum(x, block, scratch, program, levels, packed, config=config)
            _store(total, inside, row, epilogue, y, block)

        jax.lax.fori_loop(bounds[expert], bounds[expert + 1], multiply, None)
        _barrier(compiled)  # the slice has been read before the next turn clears it

    jax.lax.fori_loop(0, turns, turn, None)


def _barrier(compiled: bool) -> None:
    if compiled:  # interpret mode has no rule for it, and runs in order
        plt.debug_barrier()


def _decode(
    packed: PackedRefs, expert: Any, row: Array, scratch: Any, program: Any, *, config: Config, compiled: bool
) -> None:
    """Fill the program's slice of the scratch with digits."""
    lines = pl.ds(0, config.rows)

    def clear(i: Array, carry: None) -> None:
        columns = pl.ds(i * config.columns, config.columns)
        plt.store(scratch.at[program, lines, columns], jnp.zeros((config.rows, config.columns), jnp.int8))

    jax.lax.fori_loop(0, scratch.shape[2] // config.columns, clear, None)
    _barrier(compiled)
    line = jnp.broadcast_to(jnp.arange(config.rows)[:, None], (config.rows, config.tile))

    def visit(position: Array, digit: Array, carry: None) -> None:
        plt.store(scratch.at[program, line, position], digit.astype(jnp.int8), mask=digit != 0)

    packed.visit(expert, row, config.tile, visit, None, row < packed.rows)
    _barrier(compiled)


def _sum(
    x: Any,
    block: Array,
    scratch: Any,
    program: Any,
    levels: tuple[Float32[Array, "rows"], Float32[Array, "rows"]],
    packed: PackedRefs,
    *,
    config: Config,
) -> Float32[Array, "rows lanes"]:
    """Multiply the decoded rows by a block of tokens."""
    apart = packed.levels.dtype != jnp.bfloat16
    lines, lanes = pl.ds(0, config.rows), pl.ds(0, config.lanes)

    def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns = pl.ds(i * config.columns, config.columns)
        digits = plt.load(scratch.at[program, lines, columns])
        tokens = _load_columns(x, block, lanes, i * config.columns, packed.width, config)
        for part in bfloat16_parts(tokens):
            sums = tuple(
                total + jnp.dot(weights, part.T, preferred_element_type=jnp.float32)
                for total, weights in zip(sums, _weights(digits, levels, apart), strict=True)
            )
        return sums

    zeros = jnp.zeros((config.rows, config.lanes), jnp.float32)
    steps = scratch.shape[2] // config.columns
    sums = jax.lax.fori_loop(0, steps, step, (zeros,) * (1 + apart))
    if not apart:
        return sums[0]
    return sums[0] * levels[0][:, None] + sums[1] * levels[1][:, None]


def _load_columns(
    x: Any, block: Array, lanes: Any, start: Any, width: int, config: Config
) -> Float[Array, "lanes columns"]:
    """Load the next columns of a block of tokens, zeros beyond the width."""
    columns = pl.ds(start, config.columns)
    if width % config.columns == 0:
        return plt.load(x.at[block, lanes, columns])
    inside = (start + jnp.arange(config.columns) < width)[None, :]
    mask = jnp.broadcast_to(inside, (config.lanes, config.columns))
    return plt.load(x.at[block, lanes, columns], mask=mask, other=0)


def _weights(
    digits: Array, levels: tuple[Array, Array], apart: bool
) -> tuple[BFloat16[Array, "rows columns"], ...]:
    """Return the weights of digits, or two masks if `apart`: those of the minima and of the maxima."""
    minima, maxima = digits == 1, digits == 2
    if apart:
        return minima.astype(jnp.bfloat16), maxima.astype(jnp.bfloat16)
    low, high = (level.astype(jnp.bfloat16)[:, None] for level in levels)
    zero = jnp.zeros(digits.shape, jnp.bfloat16)
    return (jnp.where(maxima, high, jnp.where(minima, low, zero)),)


def bfloat16_parts(x: Float[Array, "lanes columns"]) -> list[BFloat16[Array, "lanes columns"]]:
    """Split `x` into bfloat16 tiles that sum exactly to `x`: 8 of a float32's 24 bits each, highest first."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & HIGH_HALF
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _store(
    total: Float32[Array, "rows lanes"], inside: Array, row: Array, epilogue: Epilogue, y: Any, block: Array
) -> None:
    """Apply the epilogue to a tile and write it."""
    lane = jnp.arange(total.shape[1])
    at = block, lane[None, :], row[:, None]
    mask = jnp.broadcast_to(inside[:, None], total.shape)
    total = epilogue.finish(
        total,
        lambda gate: plt.load(gate.at[at], mask=mask, other=0),
        lambda scale: plt.load(scale.at[block, lane])[None, :],
    )
    plt.store(y.at[at], total.astype(y.dtype), mask=mask)
