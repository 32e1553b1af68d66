"""The product on a GPU by jax-triton: one warp decodes a row for one token, or once for a block of tokens."""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from pallas_kernels.matmul.grouping import group_tokens
from pallas_kernels.matmul.triton_rows import call, first_words, nonzero, row_of
from pallas_kernels.operands import PackedMatrix

GATHERED_FROM = 2
"""Tokens per expert, on average, from which blocks of tokens share the decoding."""
SEPARATE_TILE = 128
"""Codewords that a warp takes at a time for one token: four per thread."""
GATHER_TILE, LANES = 32, 8
"""Codewords at a time and tokens per block: eight sums per thread, one load of 16 or 32 bytes per column."""


def packed_matmul(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply as `pallas_kernels.packed_matmul` does."""
    route = gathered if x.shape[0] >= GATHERED_FROM * packed.num_experts else separate
    return route(packed, x, expert_index)


def separate(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply token by token."""
    result = jax.ShapeDtypeStruct((x.shape[0], packed.rows), x.dtype)
    if x.shape[0] == 0:
        return jnp.zeros(result.shape, result.dtype)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    programs = packed.rows * x.shape[0]
    return call(
        packed_matmul_separate, packed, (expert, x), programs=programs, result=result, TILE=SEPARATE_TILE
    )


def gathered(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply blocks of `LANES` tokens of one expert."""
    if x.shape[0] == 0:
        return jnp.zeros((0, packed.rows), x.dtype)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    blocks = group_tokens(expert, packed.num_experts, LANES)
    operands = blocks.expert, blocks.dispatch(x).transpose(0, 2, 1)  # the tokens of a block side by side
    result = jax.ShapeDtypeStruct((blocks.count, packed.rows, LANES), x.dtype)
    programs = packed.rows * blocks.count
    tiles = {"TILE": GATHER_TILE, "LANES": LANES}
    y = call(packed_matmul_gather, packed, operands, programs=programs, result=result, **tiles)
    return blocks.combine(y.transpose(0, 2, 1))


@triton.jit
@no_type_check
def packed_matmul_separate(
    codes,
    offsets,
    entries,
    levels,
    experts,
    x,
    y,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CODEWORDS: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row for one token."""
    row, token = tl.program_id(0) % ROWS, (tl.program_id(0) // ROWS).to(tl.int64)
    expert = tl.load(experts + token).to(tl.int64)
    start, stop, low, high = row_of(offsets, levels, expert, row, CAPACITY, ROWS)
    codes += expert * CAPACITY
    x += token * WIDTH
    at = 0
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(start, stop, TILE):
        k = tile + tl.arange(0, TILE)
        first, entry = first_words(codes, entries, k, stop, CODEWORDS, WORDS)
        length = entry & ((1 << FIELD_BITS) - 1)
        base = at + tl.cumsum(length, 0) - length
        for word in tl.static_range(WORDS):
            if word > 0:
                entry = tl.load(entries + first + word, mask=k < stop, other=0)
            for slot in tl.static_range(SLOTS):
                column, digit = nonzero(entry, base, slot, WIDTH, FIELD_BITS)
                value = tl.load(x + column, mask=digit != 0, other=0).to(tl.float32)
                total += value * tl.where(digit == 2, high, low)
        at = tl.minimum(at + tl.sum(length, 0), WIDTH)
    tl.store(y + token * ROWS + row, tl.sum(total, 0).to(y.dtype.element_ty))


@triton.jit
@no_type_check
def packed_matmul_gather(
    codes,
    offsets,
    entries,
    levels,
    experts,
    x,
    y,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CODEWORDS: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One row for one block of tokens; a block of no expert writes nothing."""
    row, block = tl.program_id(0) % ROWS, (tl.program_id(0) // ROWS).to(tl.int64)
    expert = tl.load(experts + block).to(tl.int64)
    if expert >= 0:
        start, stop, low, high = row_of(offsets, levels, expert, row, CAPACITY, ROWS)
        codes += expert * CAPACITY
        x += block * WIDTH * LANES
        lane = tl.arange(0, LANES)
        at = 0
        total = tl.zeros((TILE, LANES), tl.float32)
        for tile in range(start, stop, TILE):
            k = tile + tl.arange(0, TILE)
            first, entry = first_words(codes, entries, k, stop, CODEWORDS, WORDS)
            length = entry & ((1 << FIELD_BITS) - 1)
            base = at + tl.cumsum(length, 0) - length
            for word in tl.static_range(WORDS):
                if word > 0:
                    entry = tl.load(entries + first + word, mask=k < stop, other=0)
                for slot in tl.static_range(SLOTS):
                    column, digit = nonzero(entry, base, slot, WIDTH, FIELD_BITS)
                    where = x + column[:, None] * LANES + lane[None, :]
                    value = tl.load(where, mask=(digit != 0)[:, None], other=0).to(tl.float32)
                    total += value * tl.where(digit == 2, high, low)[:, None]
            at = tl.minimum(at + tl.sum(length, 0), WIDTH)
        tl.store(y + (block * ROWS + row) * LANES + lane, tl.sum(total, 0).to(y.dtype.element_ty))
