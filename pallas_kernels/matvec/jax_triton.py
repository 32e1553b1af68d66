"""Triton on a GPU through jax-triton: a warp decodes one row for one token, as the Pallas kernel does."""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from pallas_kernels.operands import PackedMatrix
from pallas_kernels.triton_tiles import call, first_words, nonzero, row_of

TILE = 128  # codewords a warp takes at a time: four a thread


def matvec(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """See `packed_matvec`."""
    result = jax.ShapeDtypeStruct((x.shape[0], packed.rows), x.dtype)
    if x.shape[0] == 0:
        return jnp.zeros(result.shape, result.dtype)
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    programs = packed.rows * x.shape[0]
    return call(packed_matvec, packed, (expert, x), programs=programs, result=result, TILE=TILE)


@triton.jit
@no_type_check
def packed_matvec(
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
