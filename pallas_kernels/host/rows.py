"""Rows of codewords times blocks of tokens, decoded on the fly: the kernel under every CPU face.

Nothing that a stream holds leads out of bounds. A code beyond the table counts as the last one. A single
token's row is read unchecked as long as the longest codewords would stay within its slack, the rest with
the position held at the row's end; for wider blocks the nonzeros of a row are listed first, up to the row's
end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
from jaxtyping import Float32

from pallas_kernels.host.blocks import SLACK, Blocks, one_token_each
from pallas_kernels.host.compiled import compiled, parallel, threads
from pallas_kernels.host.gather import gather
from pallas_kernels.operands import DecodeTable, PackedMatrix

ACTIVATIONS = ("linear", "relu", "gelu")
_LINEAR, _RELU, _GELU = range(3)

_index, _word = np.uintp, np.uint32  # unsigned: numba checks signed indices for counting from the end


class Stream(NamedTuple):
    """A packed matrix as compiled functions read it.

    `slots` and `words` are empty arrays of so many dimensions: numba compiles that number in and unrolls the
    loops over it.
    """

    codes: Any
    offsets: Any
    level_bits: Any
    entries: Any
    field_bits: Any
    slots: Any
    words: Any
    max_length: int
    width: int


def stream(packed: PackedMatrix) -> Stream:
    """Its arrays read-only and contiguous, so that one compiled version serves everybody."""
    table, levels = packed.table, np.asarray(packed.levels)
    return Stream(
        _frozen(packed.codes),
        _frozen(packed.row_offsets),
        _frozen(levels.view(np.uint16 if levels.itemsize == 2 else np.uint32)),
        _frozen(table.entries).reshape(-1),
        np.uint32(table.field_bits),
        np.empty((0,) * table.slots, np.uint8),
        np.empty((0,) * table.words, np.uint8),
        table.max_length,
        packed.width,
    )


def _frozen(array: Any) -> np.ndarray:
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


@compiled
def open_row(matrix, expert, row, bits):
    """The range of a row's codewords; its levels go to `bits`, float32 patterns, under their digits."""
    shift = _word(32 - 8 * matrix.level_bits.itemsize)  # a bfloat16 is the upper half of a float32
    bits[1] = _word(matrix.level_bits[expert, row, 0]) << shift
    bits[2] = _word(matrix.level_bits[expert, row, 1]) << shift
    capacity = np.int64(matrix.codes.shape[1])
    start = min(max(np.int64(matrix.offsets[expert, row]), 0), capacity)
    return start, min(max(np.int64(matrix.offsets[expert, row + 1]), start), capacity)


def _dot_part(*, checked: bool) -> Any:
    """A dot product's share of some codewords; in two sums, since an addition waits for the one before."""

    @compiled
    def part(matrix, row, span, at, x):
        codes, level = row
        entries, field_bits, words = matrix.entries, matrix.field_bits, _index(matrix.words.ndim)
        position_mask = (_word(1) << field_bits) - _word(1)
        last = _word(len(entries) // matrix.words.ndim - 1)
        even, odd = np.float32(0), np.float32(0)
        for i in range(span[0], span[1]):
            code = _word(codes[_index(i)])
            if checked:
                code, at = min(code, last), min(at, _word(matrix.width))
            entry = _word(0)
            for k in range(matrix.words.ndim):
                entry = entries[_index(code) * words + _index(k)]
                shift = field_bits
                for j in range(matrix.slots.ndim):
                    position = _index(at) + _index((entry >> shift) & position_mask)
                    digit = _index((entry >> (shift + field_bits)) & _word(3))
                    if j % 2 == 0:
                        even += x[position] * level[digit]
                    else:
                        odd += x[position] * level[digit]
                    shift += field_bits + _word(2)
            at = _word(at + (entry & position_mask))
        return even + odd, at

    return part


_unchecked_part = _dot_part(checked=False)
_checked_part = _dot_part(checked=True)


@compiled
def _highest(codes, start, stop):
    top = codes[0] ^ codes[0]  # a zero of the codes' type: LLVM then compares a vector of them at a time
    for i in range(start, stop):
        top = max(top, codes[_index(i)])
    return top


@compiled
def _dot(matrix, row, span, x):
    start, stop = span
    at, total = _word(0), np.float32(0)
    if _word(_highest(row[0], start, stop)) < _word(len(matrix.entries) // matrix.words.ndim):
        while start < stop:
            safe = min((len(x) - np.int64(at)) // matrix.max_length, stop - start)
            if safe < 4:
                break
            part, at = _unchecked_part(matrix, row, (start, start + safe), at, x)
            total += part
            start += safe
    part, at = _checked_part(matrix, row, (start, stop), at, x)
    return total + part


@compiled
def nonzeros(matrix, row, span, positions, values):
    """Lists the nonzeros of a `row` (its expert's codes, its levels) and counts them.

    An empty slot is listed too, and overwritten by what comes next.
    """
    codes, level = row
    entries, field_bits, words = matrix.entries, matrix.field_bits, _index(matrix.words.ndim)
    position_mask, width = (_word(1) << field_bits) - _word(1), _word(matrix.width)
    last = _word(len(entries) // matrix.words.ndim - 1)
    at, count = _word(0), _index(0)
    for i in range(span[0], span[1]):
        if at >= width:
            break
        code = min(_word(codes[_index(i)]), last)
        entry = _word(0)
        for k in range(matrix.words.ndim):
            entry = entries[_index(code) * words + _index(k)]
            shift = field_bits
            for _ in range(matrix.slots.ndim):
                digit = _index((entry >> (shift + field_bits)) & _word(3))
                positions[count] = _word(at + ((entry >> shift) & position_mask))
                values[count] = level[digit]
                count += min(digit, _index(1))
                shift += field_bits + _word(2)
        at = _word(at + (entry & position_mask))
    while count > _index(0) and positions[count - _index(1)] >= width:  # the last codeword's tail
        count -= _index(1)
    return count


@compiled
def _activate(y, start, count, activation):
    for i in range(start, start + count):
        v = y[_index(i)]
        if activation == _RELU:
            y[_index(i)] = max(v, np.float32(0))
        elif activation == _GELU:  # the tanh form, as jax.nn.gelu
            inner = np.float32(0.7978845608028654) * (v + np.float32(0.044715) * v * v * v)
            y[_index(i)] = np.float32(0.5) * v * (np.float32(1) + np.tanh(inner))


@parallel
def _product(matrix, blocks, x, y, activation):
    """y = activation(W x), block by block. A thread takes a share of the rows of every block."""
    block_expert, block_lanes, block_first, parts = blocks
    rows, width = matrix.offsets.shape[1] - 1, matrix.width
    room = width + matrix.slots.ndim * matrix.words.ndim
    for part in numba.prange(parts):
        bits = np.zeros(4, np.uint32)
        level = bits.view(np.float32)  # by digit: 0, minimum, maximum
        positions, values = np.empty(room, np.uint32), np.empty(room, np.float32)
        for block in range(len(block_expert)):
            expert, lanes = block_expert[block], block_lanes[block]
            x_start, y_start = block_first[block] * (width + SLACK), block_first[block] * (rows + SLACK)
            read = matrix.codes[expert], level
            for row in range(rows * part // parts, rows * (part + 1) // parts):
                span = open_row(matrix, expert, row, bits)
                to = y_start + row * lanes
                if lanes == 1:
                    x_row = x[x_start : x_start + width + SLACK]
                    y[to] = _dot(matrix, read, span, x_row)
                else:
                    count = nonzeros(matrix, read, span, positions, values)
                    gather(lanes, (x, x_start), (positions, values, count), (y, to))
                if activation != _LINEAR:
                    _activate(y, to, lanes, activation)


def product(
    packed: PackedMatrix, blocks: Blocks, x: Float32[np.ndarray, "number"], activation: str = "linear"
) -> Float32[np.ndarray, "result"]:
    """The experts of `blocks` times `x`, which lies over the blocks as `Blocks` says; the result does too.

    The arrays of `packed` are NumPy's, anywhere in memory: they are read where they are. Experts in
    `blocks` must exist. `activation` is one of `ACTIVATIONS` ("gelu" in its tanh form).
    """
    y = blocks.empty(packed.rows)
    where = blocks.expert, blocks.lanes, blocks.first, threads()
    _product(stream(packed), where, x, y, ACTIVATIONS.index(activation))
    return y


def compile_for(packed: PackedMatrix) -> None:
    """Compiles what `product` needs for such operands: seconds once, later runs find it in numba's cache.

    Called while tracing, so that no step has to wait for it and numba starts its threads from Python's.
    """
    levels = np.dtype(packed.levels.dtype)
    _compile(np.dtype(packed.codes.dtype), levels, packed.table.slots, packed.table.words)


@functools.lru_cache
def _compile(code: np.dtype, level: np.dtype, slots: int, words: int) -> None:
    table = DecodeTable(np.zeros((1, words), np.uint32), 1, slots, 1)
    codes, offsets = np.zeros((1, 1), code), np.zeros((1, 1), np.int32)
    packed = PackedMatrix(codes, offsets, np.zeros((1, 0, 2), level), table, 1)
    nothing = one_token_each(np.zeros(0, np.int32))
    none = np.zeros((0, 1), np.float32)
    nothing.collect(product(packed, nothing, nothing.spread(none)), np.zeros(0, np.float32), none)
