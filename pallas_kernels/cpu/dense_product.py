"""Products with matrices kept in bfloat16, widened in registers: half the bytes of float32, and bytes are the limit."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt16
from llvmlite import ir
from numba.core import types

from pallas_kernels.cpu.compiled import compiled, threads
from pallas_kernels.cpu.simd import intrinsic
from pallas_kernels.cpu.threads import share, take

ROWS = 8  # of the matrix, read side by side: as many streams as the processor's prefetchers follow
PIECES = 2  # for each thread, at least
# Columns read at a time: 8 KB of each row in one piece for one token, and fewer for more, so that their sums (16 KB in
# all) and the rows at hand stay in the first cache.
COLUMNS, LEAST_COLUMNS = 4096, 256


@intrinsic
def _widen(typing, bits):
    """`_widen(bits)`: the float32 whose upper half these bits are."""

    def generate(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


# An array is cut to the columns at hand before a loop over them: LLVM then knows that no index wraps around, and works
# on whole vectors.


@compiled
def _add_rows(w, row, start, stop, x, total):
    """`total += x[row : row + 8] @ w[row : row + 8, start:stop]`, for one token."""
    a, b, c, d = w[row, start:stop], w[row + 1, start:stop], w[row + 2, start:stop], w[row + 3, start:stop]
    e, f, g, h = (
        w[row + 4, start:stop],
        w[row + 5, start:stop],
        w[row + 6, start:stop],
        w[row + 7, start:stop],
    )
    p, q, r, s = x[row], x[row + 1], x[row + 2], x[row + 3]
    t, u, v, z = x[row + 4], x[row + 5], x[row + 6], x[row + 7]
    for j in range(stop - start):
        near = p * _widen(a[j]) + q * _widen(b[j]) + r * _widen(c[j]) + s * _widen(d[j])
        far = t * _widen(e[j]) + u * _widen(f[j]) + v * _widen(g[j]) + z * _widen(h[j])
        total[j] += near + far


@compiled
def _add_rows_twice(w, row, start, stop, x, total, total1):
    """The same for two tokens, which share the widening."""
    a, b, c, d = w[row, start:stop], w[row + 1, start:stop], w[row + 2, start:stop], w[row + 3, start:stop]
    e, f, g, h = (
        w[row + 4, start:stop],
        w[row + 5, start:stop],
        w[row + 6, start:stop],
        w[row + 7, start:stop],
    )
    p, q, r, s = x[0, row], x[0, row + 1], x[0, row + 2], x[0, row + 3]
    t, u, v, z = x[0, row + 4], x[0, row + 5], x[0, row + 6], x[0, row + 7]
    p1, q1, r1, s1 = x[1, row], x[1, row + 1], x[1, row + 2], x[1, row + 3]
    t1, u1, v1, z1 = x[1, row + 4], x[1, row + 5], x[1, row + 6], x[1, row + 7]
    for j in range(stop - start):
        k, o, m, n = _widen(a[j]), _widen(b[j]), _widen(c[j]), _widen(d[j])
        k1, l1, m1, n1 = _widen(e[j]), _widen(f[j]), _widen(g[j]), _widen(h[j])
        total[j] += (p * k + q * o + r * m + s * n) + (t * k1 + u * l1 + v * m1 + z * n1)
        total1[j] += (p1 * k + q1 * o + r1 * m + s1 * n) + (t1 * k1 + u1 * l1 + v1 * m1 + z1 * n1)


@compiled
def _add_row(w, row, start, stop, x, total):
    """One row, where fewer than eight are left."""
    a = w[row, start:stop]
    for j in range(stop - start):
        total[j] += x * _widen(a[j])


@compiled
def _add_block(w, x, rows, columns, totals):
    """Adds what some rows and columns of the matrix give; the rows at hand come from memory once."""
    (low, high), (start, stop), tokens = rows, columns, len(x)
    whole = low + (high - low) // ROWS * ROWS
    for row in range(low, whole, ROWS):
        for token in range(0, tokens - 1, 2):
            near, far = totals[token, start:stop], totals[token + 1, start:stop]
            _add_rows_twice(w, row, start, stop, x[token : token + 2], near, far)
        if tokens % 2:
            _add_rows(w, row, start, stop, x[tokens - 1], totals[tokens - 1, start:stop])
    for row in range(whole, high):
        for token in range(tokens):
            _add_row(w, row, start, stop, x[token, row], totals[token, start:stop])


@compiled
def _product(taken, w, x, partial, each):
    """A piece is `each` rows and all columns, read as they lie, with sums of its own, in one order always."""
    columns = max(LEAST_COLUMNS, COLUMNS // len(x))
    piece = take(taken)
    while piece < len(partial):
        low, high, totals = piece * each, min((piece + 1) * each, w.shape[0]), partial[piece]
        for start in range(0, w.shape[1], columns):
            _add_block(w, x, (low, high), (start, min(start + columns, w.shape[1])), totals)
        piece = take(taken)


def product(
    w: UInt16[np.ndarray, "in out"], x: Float32[np.ndarray, "t in"], y: Float32[np.ndarray, "t out"]
) -> None:
    """Writes `x @ w` into `y`; `w` are the bits of bfloat16 numbers. Threads take rows."""
    if len(x) == 0:
        return
    each = max(ROWS, -(-w.shape[0] // (PIECES * threads() * ROWS)) * ROWS)
    partial = np.zeros((-(-w.shape[0] // each), *y.shape), np.float32)
    share(_product, w, x, partial, each)
    np.sum(partial, axis=0, out=y)


def compile_product() -> None:
    """Compiles it: seconds once, later runs find it in numba's cache."""
    w, x, y = np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    for array in (w, x):
        array.flags.writeable = False
    product(w, x, y)
