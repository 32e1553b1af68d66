"""Tokens times matrices in bfloat16, widened in registers.

Memory bandwidth limits this product, and bfloat16 has half the bytes of float32.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt16

from pallas_kernels.cpu.compiled import compiled, read_only
from pallas_kernels.cpu.simd import widen
from pallas_kernels.cpu.threads import next_chunk, num_threads, parallel_for

_ROWS = 8  # read side by side, as many as the processor's prefetchers follow
_CHUNKS_PER_THREAD = 2
# Columns read at a time: 8 KB of each row in one go for one token, and fewer for more, so that their sums (16
# KB in all) and the rows at hand stay in the first-level cache.
_COLUMNS, _LEAST_COLUMNS = 4096, 256


def dense_product(
    w: UInt16[np.ndarray, "in out"], x: Float32[np.ndarray, "t in"], y: Float32[np.ndarray, "t out"]
) -> None:
    """Write `x @ w` into `y`, rows of `w` in parallel; from any thread.

    Each chunk of rows has its own sums, added up in one order: the result has the same bits every time, but
    depends on the number of threads. It takes memory for two such sums per thread, `2 * num_threads()` times
    `y`.

    Args:
        w: the bits of bfloat16 numbers, read-only.
        x: the tokens, read-only.
        y: receives the result.
    """
    if len(x) == 0:
        return
    chunk_rows = max(_ROWS, -(-w.shape[0] // (_CHUNKS_PER_THREAD * num_threads() * _ROWS)) * _ROWS)
    partial = np.zeros((-(-w.shape[0] // chunk_rows), *y.shape), np.float32)
    parallel_for(_multiply_chunks, w, x, partial, chunk_rows)
    np.sum(partial, axis=0, out=y)


def precompile() -> None:
    """Compile `dense_product`: for seconds once, later read from numba's cache."""
    w, x, y = np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    dense_product(read_only(w), read_only(x), y)


@compiled
def _multiply_chunks(counter, w, x, partial, chunk_rows):
    """Add `chunk_rows` rows to the sums `partial[chunk]`, float32 [t, out], in one order always."""
    columns = max(_LEAST_COLUMNS, _COLUMNS // len(x))
    chunk = next_chunk(counter)
    while chunk < len(partial):
        first, stop, sums = chunk * chunk_rows, min((chunk + 1) * chunk_rows, w.shape[0]), partial[chunk]
        for column in range(0, w.shape[1], columns):
            _add_block(w, x, (first, stop), (column, min(column + columns, w.shape[1])), sums)
        chunk = next_chunk(counter)


@compiled
def _add_block(w, x, rows, columns, sums):
    """Add the products with some rows and columns of the matrix, eight rows at a time for all tokens."""
    (first, last), (start, stop), tokens = rows, columns, len(x)
    whole = first + (last - first) // _ROWS * _ROWS
    for row in range(first, whole, _ROWS):
        for token in range(0, tokens - 1, 2):
            total_x, total_y = sums[token, start:stop], sums[token + 1, start:stop]
            _add_rows_twice(w, row, start, stop, x[token : token + 2], total_x, total_y)
        if tokens % 2:
            _add_rows(w, row, start, stop, x[tokens - 1], sums[tokens - 1, start:stop])
    for row in range(whole, last):
        for token in range(tokens):
            _add_row(w, row, start, stop, x[token, row], sums[token, start:stop])


# Arrays are cut to the columns at hand before a loop over them: LLVM then knows that no index wraps around,
# and works on whole vectors.


@compiled
def _add_rows(w, row, start, stop, x, total):
    """`total += x[row : row + 8] @ w[row : row + 8, start:stop]` for one token."""
    w0, w1, w2, w3 = (
        w[row, start:stop],
        w[row + 1, start:stop],
        w[row + 2, start:stop],
        w[row + 3, start:stop],
    )
    w4, w5 = w[row + 4, start:stop], w[row + 5, start:stop]
    w6, w7 = w[row + 6, start:stop], w[row + 7, start:stop]
    x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
    x4, x5, x6, x7 = x[row + 4], x[row + 5], x[row + 6], x[row + 7]
    for j in range(stop - start):
        low = x0 * widen(w0[j]) + x1 * widen(w1[j]) + x2 * widen(w2[j]) + x3 * widen(w3[j])
        high = x4 * widen(w4[j]) + x5 * widen(w5[j]) + x6 * widen(w6[j]) + x7 * widen(w7[j])
        total[j] += low + high


@compiled
def _add_rows_twice(w, row, start, stop, x, total_x, total_y):
    """Do as `_add_rows` for the two tokens of `x`, which share the widening."""
    w0, w1, w2, w3 = (
        w[row, start:stop],
        w[row + 1, start:stop],
        w[row + 2, start:stop],
        w[row + 3, start:stop],
    )
    w4, w5 = w[row + 4, start:stop], w[row + 5, start:stop]
    w6, w7 = w[row + 6, start:stop], w[row + 7, start:stop]
    x0, x1, x2, x3 = x[0, row], x[0, row + 1], x[0, row + 2], x[0, row + 3]
    x4, x5, x6, x7 = x[0, row + 4], x[0, row + 5], x[0, row + 6], x[0, row + 7]
    y0, y1, y2, y3 = x[1, row], x[1, row + 1], x[1, row + 2], x[1, row + 3]
    y4, y5, y6, y7 = x[1, row + 4], x[1, row + 5], x[1, row + 6], x[1, row + 7]
    for j in range(stop - start):
        v0, v1, v2, v3 = widen(w0[j]), widen(w1[j]), widen(w2[j]), widen(w3[j])
        v4, v5, v6, v7 = widen(w4[j]), widen(w5[j]), widen(w6[j]), widen(w7[j])
        total_x[j] += (x0 * v0 + x1 * v1 + x2 * v2 + x3 * v3) + (x4 * v4 + x5 * v5 + x6 * v6 + x7 * v7)
        total_y[j] += (y0 * v0 + y1 * v1 + y2 * v2 + y3 * v3) + (y4 * v4 + y5 * v5 + y6 * v6 + y7 * v7)


@compiled
def _add_row(w, row, start, stop, x, total):
    """Add one row, where fewer than eight are left; `x` is the token's number."""
    w0 = w[row, start:stop]
    for j in range(stop - start):
        total[j] += x * widen(w0[j])
