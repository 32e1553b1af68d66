"""The inner loop under every packed product: a row of codewords times a block of tokens, decoded on the fly.

One table entry holds all of a codeword. Each of its slots holds `step` times a position plus a digit, with
the step of `packed_view`. Added to `step` times the column at which the codeword begins, it is a *place*:
column and digit of a nonzero in one number, so that decoding takes a load and an addition per nonzero, and no
branch on the digit. A slot without a nonzero is a place of digit 0. The number of lanes decides what a place
adds:

- One token (`SINGLE_STEP`, 3): the token's number for column c lies at 3 c + 2, behind two zeros. The pair of
  numbers that begins at 3 c + digit is (0, 0), (0, x) or (x, 0) for the digits 0, 1 and 2. Pairs are added,
  and the levels multiply the two sums once, at the end of the row.
- 8 to 32 lanes (`LANES_STEP`, 4): of place 4 c + digit, the lanes of column c times the digit's level are
  added; the level of digit 0 is zero.
- 64 lanes: the same, but the places of nonzeros are listed first, since here an empty slot costs as much
  arithmetic as a full one.

An addition waits for the one before it on the same sum: up to 16 lanes take four sums in turn, 32 lanes two.

No codeword leads out of bounds. Several codewords are read without a check as long as the row's place is
before its end: as far as they can go past it, there are the zeros of `SLACK_COLUMNS`. The last codewords of a
row, and all of a codebook whose codewords are too long for that, are read singly, each place held at the end
of the row.

Names in compiled code: `matrix` is a `PackedView`, `level` the row's float32 [4] by digit, `sums` a tuple of
vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from pallas_kernels.cpu.compiled import OPTIONS, as_index, compiled
from pallas_kernels.cpu.packed_view import (
    LANES_STEP,
    SINGLE_STEP,
    codeword_length,
    entry_word,
    open_row,
    slot_field,
)
from pallas_kernels.cpu.simd import add, lane, load, multiply_add, store, zeros
from pallas_kernels.cpu.token_blocks import SINGLE_OFFSET, SINGLE_STRIDE, SLACK_COLUMNS

_UNCHECKED = 4  # codewords read without a check in between
_LISTED_LANES = 64  # from here on, nonzeros are listed


class _Row(NamedTuple):
    """A row's codewords: `codes[start:stop]`."""

    codes: Any
    start: Any
    stop: Any


class _Tokens(NamedTuple):
    """A block's columns `x`, the levels of the row at hand, and scratch memory for a row's places."""

    x: Any
    level: Any
    places: Any


@compiled
def multiply_rows(matrix, expert, rows, lanes, x, y):
    """Write the products of an expert's `rows` (first, last + 1) with one block of tokens.

    `x` and `y`, float32, are the block's parts of data over blocks, of `matrix.width` and of the matrix's
    rows columns; see `TokenBlocks`. `lanes` is 1, 8, 16, 32 or 64. Each case is compiled for its own vectors.
    """
    if lanes == 1:
        zero = zeros(2)
        _multiply_rows(matrix, expert, rows, x, y, SINGLE_STRIDE, (zero, zero, zero, zero))
    elif lanes == 8:
        zero = zeros(8)
        _multiply_rows(matrix, expert, rows, x, y, lanes, (zero, zero, zero, zero))
    elif lanes == 16:
        zero = zeros(16)
        _multiply_rows(matrix, expert, rows, x, y, lanes, (zero, zero, zero, zero))
    elif lanes == 32:
        zero = zeros(32)
        _multiply_rows(matrix, expert, rows, x, y, lanes, (zero, zero))
    else:
        zero = zeros(64)
        _multiply_rows(matrix, expert, rows, x, y, lanes, (zero,))


@compiled
def _multiply_rows(matrix, expert, rows, x, y, stride, zero_sums):
    level_bits = np.zeros(4, np.uint32)
    level = level_bits.view(np.float32)  # by digit: 0, minimum, maximum, 0
    places = np.empty(matrix.width + matrix.words.ndim * matrix.slots.ndim, np.uintp)
    codes = matrix.codes[expert]
    for row in range(rows[0], rows[1]):
        start, stop = open_row(matrix, expert, row, level_bits)
        sums = add_row(matrix, _Row(codes, start, stop), _Tokens(x, level, places), zero_sums)
        write_sum(y, as_index(row * stride), _total(sums), level)


@compiled
def _total(sums):
    total = sums[0]
    for k in range(1, len(sums)):
        total = add(total, sums[k])
    return total


# Functions that numba compiles differently by the lanes of the sums. Python never calls them.


def add_row(matrix: Any, row: Any, tokens: Any, sums: Any) -> Any:
    """Return `sums` with the products of a row's codewords added."""
    raise NotImplementedError("for compiled code")


def add_place(total: Any, x: Any, place: Any, level: Any) -> Any:
    """Return `total` with the product of one place added."""
    raise NotImplementedError("for compiled code")


def write_sum(y: Any, index: Any, total: Any, level: Any) -> Any:
    """Write a row's sum to `y` from `index` on."""
    raise NotImplementedError("for compiled code")


@overload(add_row, jit_options=OPTIONS)
def _add_row(matrix, row, tokens, sums):
    lanes = sums[0].lanes
    if lanes == 2:
        return lambda matrix, row, tokens, sums: _add_codewords(
            matrix, matrix.single_entries, SINGLE_STEP, row, tokens, sums
        )
    if lanes < _LISTED_LANES:
        return lambda matrix, row, tokens, sums: _add_codewords(
            matrix, matrix.lane_entries, LANES_STEP, row, tokens, sums
        )
    return _add_listed_places.py_func


@overload(add_place, jit_options=OPTIONS)
def _add_place(total, x, place, level):
    lanes = total.lanes
    if lanes == 2:
        return lambda total, x, place, level: add(total, load(total, x, place))
    return lambda total, x, place, level: multiply_add(
        level[place & as_index(3)], load(total, x, (place >> as_index(2)) * as_index(lanes)), total
    )


@overload(write_sum, jit_options=OPTIONS)
def _write_sum(y, index, total, level):
    if total.lanes == 2:
        return _write_pair.py_func
    return lambda y, index, total, level: store(y, index, total)


@compiled
def _write_pair(y, index, total, level):
    y[index + as_index(SINGLE_OFFSET)] = lane(total, 0) * level[2] + lane(total, 1) * level[1]


@compiled
def _add_codewords(matrix, entries, step, row, tokens, sums):
    i, stop, begin, no_end = row.start, row.stop, as_index(0), None
    unchecked, end = as_index(_UNCHECKED), as_index(step) * as_index(matrix.width)
    if _UNCHECKED * ((1 << matrix.field_bits.ndim) - 1) <= SLACK_COLUMNS:
        while begin < end and i + unchecked <= stop:
            for k in range(_UNCHECKED):
                code = row.codes[i + as_index(k)]
                begin, sums = _add_codeword(matrix, entries, step, code, begin, no_end, tokens, sums)
            i += unchecked
    while begin < end and i < stop:
        begin, sums = _add_codeword(matrix, entries, step, row.codes[i], begin, end, tokens, sums)
        i += as_index(1)
    return sums


@compiled
def _add_codeword(matrix, entries, step, code, begin, end, tokens, sums):
    """Return (the place at which the next codeword begins, sums); with an `end`, places are held there."""
    word = entry_word(matrix, entries, code, 0)
    for w in range(matrix.words.ndim):
        if w > 0:
            word = entry_word(matrix, entries, code, w)
        for slot in range(matrix.slots.ndim):
            place = begin + slot_field(matrix, word, slot)
            if end is not None:
                place = min(place, end)
            added = add_place(sums[0], tokens.x, place, tokens.level)
            sums = sums[1:] + (added,)  # noqa: RUF005 - not in numba
    return begin + as_index(step) * codeword_length(matrix, word), sums


@compiled
def _add_listed_places(matrix, row, tokens, sums):
    for n in range(_list_places(matrix, row, tokens.places)):
        added = add_place(sums[0], tokens.x, tokens.places[n], tokens.level)
        sums = sums[1:] + (added,)  # noqa: RUF005 - not in numba
    return sums


@compiled
def _list_places(matrix, row, places):
    """Write the places of a row's nonzeros to `places` and return their number.

    Any other place is written too, without a branch, and written over by the next one.
    """
    i, begin, end = row.start, as_index(0), as_index(LANES_STEP) * as_index(matrix.width)
    count, most = as_index(0), as_index(len(places) - matrix.words.ndim * matrix.slots.ndim)
    while begin < end and i < row.stop and count <= most:
        code, length = row.codes[i], as_index(0)
        for w in range(matrix.words.ndim):
            word = entry_word(matrix, matrix.lane_entries, code, w)
            length = codeword_length(matrix, word)
            for slot in range(matrix.slots.ndim):
                place = begin + slot_field(matrix, word, slot)
                places[count] = place
                count += min(place & as_index(3), as_index(1)) * as_index(place < end)
        begin += as_index(LANES_STEP) * length
        i += as_index(1)
    return count
