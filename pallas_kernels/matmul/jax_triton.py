"""Triton on a GPU through jax-triton: a warp decodes one row once for a block of tokens of one expert."""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouping import group_tokens
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.triton_tiles import call, first_words, nonzero, row_of

TILE = 32  # codewords at a time; with eight tokens each a thread holds eight sums
LANES = 8  # tokens of a block: a codeword's column is then one load of 16 or 32 bytes


def packed_matmul(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """See `packed_matmul`."""
    if x.shape[0] == 0:
        return jnp.zeros((0, packed.rows), x.dtype)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    groups = group_tokens(expert, packed.num_experts, LANES)
    blocks = groups.expert.shape[0]
    operands = groups.expert, groups.spread(x).transpose(0, 2, 1)  # tokens side by side
    result = jax.ShapeDtypeStruct((blocks, packed.rows, LANES), x.dtype)
    tiles = {"TILE": TILE, "LANES": LANES}
    y = call(packed_matmul_gather, packed, operands, programs=packed.rows * blocks, result=result, **tiles)
    return groups.collect(y.transpose(0, 2, 1))


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
