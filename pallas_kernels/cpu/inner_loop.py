"""A row of codewords times a block of tokens, decoded on the fly: the inner loops under every product.

One entry of the table says all about a codeword. Its slots hold a multiple of the position plus the digit, so with
the row's position added likewise, each is a place: column and digit.

- One token: its numbers lie as 0, 0, x, and the pair of numbers that begins at place 3 * column + digit is (0, 0),
  (0, x) or (x, 0) for the digits 0, 1, 2. Pairs are added, no digit is looked at, and the levels multiply the two
  sums at the row's end.
- Several: of place 4 * column + digit, the column's lanes are multiplied by the digit's level and added.
- Many: the places of nonzeros are listed first, since an empty slot would cost as much as a full one.

Nothing that a stream holds leads out of bounds. Some codewords are read at a time as long as the place is before
the end, behind which lie zeros for what they may pass it by; the rest of a row's codewords, and the longest ones,
are read singly, each place held at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from pallas_kernels.cpu.codebook_tables import entry_of, field_of, length_of, open_row
from pallas_kernels.cpu.compiled import OPTIONS, compiled
from pallas_kernels.cpu.simd import add, lane, load, multiply_add, store, zeros
from pallas_kernels.cpu.token_blocks import ALONE, ALONE_PLACE, SLACK

_index = np.uintp
_AHEAD = 4  # codewords read without a check
_LISTED = 64  # lanes for which nonzeros are listed


def add_place(total: Any, x: Any, place: Any, level: Any) -> Any:
    """`total` with what a place adds to it, in compiled code."""
    raise NotImplementedError("for compiled code")


def write_sum(y: Any, at: Any, total: Any, level: Any) -> Any:
    """Writes a row's sum to `y`, in compiled code."""
    raise NotImplementedError("for compiled code")


def add_row(matrix: Any, codes: Any, span: Any, totals: Any, tokens: Any) -> Any:
    """`totals` with what the codewords of `span` add to them, in compiled code.

    `tokens` are (x, level, room for a list of places).
    """
    raise NotImplementedError("for compiled code")


@overload(add_place, jit_options=OPTIONS)
def _add_place(total, x, place, level):
    lanes = total.lanes
    if lanes == 2:
        return lambda total, x, place, level: add(total, load(total, x, place))
    return lambda total, x, place, level: multiply_add(
        level[place & _index(3)], load(total, x, (place >> _index(2)) * _index(lanes)), total
    )


@compiled
def _write_levels(y, at, total, level):
    y[at + _index(ALONE_PLACE)] = lane(total, 0) * level[2] + lane(total, 1) * level[1]


@overload(write_sum, jit_options=OPTIONS)
def _write_sum(y, at, total, level):
    if total.lanes == 2:
        return _write_levels.py_func
    return lambda y, at, total, level: store(y, at, total)


@overload(add_row, jit_options=OPTIONS)
def _add_row(matrix, codes, span, totals, tokens):
    if totals[0].lanes == 2:
        return lambda matrix, codes, span, totals, tokens: _add_at_once(
            matrix, (codes, matrix.pair_entries, 3), span, totals, tokens
        )
    if totals[0].lanes < _LISTED:
        return lambda matrix, codes, span, totals, tokens: _add_at_once(
            matrix, (codes, matrix.entries, 4), span, totals, tokens
        )
    return _add_listed.py_func


@compiled
def _add_codeword(matrix, code, read, totals, tokens, end):
    """(place of the next codeword, sums): the sums take turns, since an addition waits for the one before.

    With an `end`, places are held there.
    """
    (at, entries, step), (x, level, _) = read, tokens
    entry = entry_of(matrix, entries, code, 0)
    for word in range(matrix.words.ndim):
        if word > 0:
            entry = entry_of(matrix, entries, code, word)
        for slot in range(matrix.slots.ndim):
            place = at + field_of(matrix, entry, slot)
            if end is not None:
                place = min(place, end)
            totals = totals[1:] + (add_place(totals[0], x, place, level),)  # noqa: RUF005 - not in numba
    return at + _index(step) * length_of(matrix, entry), totals


@compiled
def _add_at_once(matrix, read, span, totals, tokens):
    (codes, entries, step), (i, stop), at, none = read, span, _index(0), None
    ahead, end = _index(_AHEAD), _index(step) * _index(matrix.width)
    if _AHEAD * ((1 << matrix.field_bits.ndim) - 1) <= SLACK:
        while at < end and i + ahead <= stop:
            for k in range(_AHEAD):
                code = codes[i + _index(k)]
                at, totals = _add_codeword(matrix, code, (at, entries, step), totals, tokens, none)
            i += ahead
    while at < end and i < stop:
        at, totals = _add_codeword(matrix, codes[i], (at, entries, step), totals, tokens, end)
        i += _index(1)
    return totals


@compiled
def _add_listed(matrix, codes, span, totals, tokens):
    x, level, places = tokens
    for n in range(_list_places(matrix, codes, span, places)):
        totals = totals[1:] + (add_place(totals[0], x, places[n], level),)  # noqa: RUF005 - not in numba
    return totals


@compiled
def _list_places(matrix, codes, span, places):
    """How many nonzeros there are; what is none is listed too, and overwritten by what comes next."""
    (i, stop), at, end = span, _index(0), _index(4) * _index(matrix.width)
    count, room = _index(0), _index(len(places) - matrix.words.ndim * matrix.slots.ndim)
    while at < end and i < stop and count <= room:
        code, length = codes[i], _index(0)
        for word in range(matrix.words.ndim):
            entry = entry_of(matrix, matrix.entries, code, word)
            length = length_of(matrix, entry)
            for slot in range(matrix.slots.ndim):
                place = at + field_of(matrix, entry, slot)
                places[count] = place
                count += min(place & _index(3), _index(1)) * _index(place < end)
        at += _index(4) * length
        i += _index(1)
    return count


@compiled
def _total(totals):
    total = totals[0]
    for k in range(1, len(totals)):
        total = add(total, totals[k])
    return total


@compiled
def _multiply(matrix, expert, rows, tokens, size, totals):
    x, y = tokens
    bits = np.zeros(4, np.uint32)
    level = bits.view(np.float32)  # by digit: 0, minimum, maximum, 0
    places = np.empty(matrix.width + matrix.words.ndim * matrix.slots.ndim, np.uintp)
    codes = matrix.codes[expert]
    for row in range(rows[0], rows[1]):
        span = open_row(matrix, expert, row, bits)
        sums = add_row(matrix, codes, span, totals, (x, level, places))
        write_sum(y, _index(row * size), _total(sums), level)


@compiled
def multiply_rows(matrix, expert, rows, lanes, x, y):
    """Writes the products of `rows` (first, last + 1) with a block's tokens to its `y`, both as `Blocks` says."""
    if lanes == 1:
        total = zeros(2)
        _multiply(matrix, expert, rows, (x, y), ALONE, (total, total, total, total))
    elif lanes == 8:
        total = zeros(8)
        _multiply(matrix, expert, rows, (x, y), lanes, (total, total, total, total))
    elif lanes == 16:
        total = zeros(16)
        _multiply(matrix, expert, rows, (x, y), lanes, (total, total, total, total))
    elif lanes == 32:
        total = zeros(32)
        _multiply(matrix, expert, rows, (x, y), lanes, (total, total))
    else:
        total = zeros(64)
        _multiply(matrix, expert, rows, (x, y), lanes, (total,))
