"""Reads rows of codewords inside jax-triton kernels, as `pallas_kernels.tiles` does inside Pallas ones.

Imported only where jax-triton runs. `no_type_check`: Triton compiles the source of these functions, which are
never called as Python. Expert offsets are 64-bit, so codes may take any number of bytes.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.operands import PackedMatrix

# jax-triton 0.4 renamed the argument for the result.
_RESULT = "out_type" if jax_triton.__version_info__ >= (0, 4) else "out_shape"


def call(
    kernel: Any,
    packed: PackedMatrix,
    operands: tuple[Array, ...],
    *,
    programs: int,
    result: Any,
    **static: int,
) -> Array:
    """Run a kernel with one warp per program and return its `result`.

    The kernel is given `packed`, `operands`, the result and the static arguments. Under vmap the calls run in
    sequence: jax-triton has no batching rule.
    """
    table = packed.table
    constants = {
        "CAPACITY": packed.codes.shape[1],
        "ROWS": packed.rows,
        "WIDTH": packed.width,
        "CODEWORDS": table.entries.shape[0],
        "WORDS": table.words,
        "SLOTS": table.slots,
        "FIELD_BITS": table.field_bits,
    }
    options = {_RESULT: result, "num_warps": 1, "num_stages": 1}

    def run(*arrays: Array) -> Array:
        return jax_triton.triton_call(
            *arrays, kernel=kernel, grid=(programs,), **options, **constants, **static
        )

    entries = jax.lax.bitcast_convert_type(table.entries, jnp.int32)
    stored = (packed.codes, packed.row_offsets, entries, packed.levels)
    batched: Callable[..., Array] = jax.custom_batching.sequential_vmap(run)
    return batched(*map(jnp.asarray, stored), *operands)


@triton.jit
@no_type_check
def row_of(offsets, levels, expert, row, CAPACITY: tl.constexpr, ROWS: tl.constexpr):
    """Return (first codeword, end, minimum, maximum) of a row, within the capacity whatever is stored."""
    bound = offsets + expert * (ROWS + 1) + row
    start = tl.minimum(tl.maximum(tl.load(bound), 0), CAPACITY)
    stop = tl.minimum(tl.maximum(tl.load(bound + 1), 0), CAPACITY)
    level = levels + (expert * ROWS + row) * 2
    return start, stop, tl.load(level).to(tl.float32), tl.load(level + 1).to(tl.float32)


@triton.jit
@no_type_check
def first_words(codes, entries, k, stop, CODEWORDS: tl.constexpr, WORDS: tl.constexpr):
    """Return (index of the entry, its first word) of the codewords at `k`; 0 beyond the row."""
    code = tl.load(codes + k, mask=k < stop, other=0).to(tl.int32)
    first = tl.minimum(code, CODEWORDS - 1) * WORDS
    return first, tl.load(entries + first, mask=k < stop, other=0)


@triton.jit
@no_type_check
def nonzero(entry, base, slot: tl.constexpr, WIDTH: tl.constexpr, FIELD_BITS: tl.constexpr):
    """Return (column, digit) of one slot of the entries; digit 0 marks an empty slot."""
    shift: tl.constexpr = FIELD_BITS + slot * (FIELD_BITS + 2)
    column = base + ((entry >> shift) & ((1 << FIELD_BITS) - 1))
    digit = (entry >> (shift + FIELD_BITS)) & 3
    return column, tl.where(column < WIDTH, digit, 0)
