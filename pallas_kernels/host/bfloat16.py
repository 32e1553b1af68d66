"""Products with matrices kept in bfloat16, widened in registers: half the bytes of float32, and bytes are the limit."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt16
from llvmlite import ir
from numba.core import types

from pallas_kernels.host.compiled import compiled, threads
from pallas_kernels.host.share import share, take
from pallas_kernels.host.simd import intrinsic

ROWS = 8  # of the matrix, read side by side: as many streams as the processor's prefetchers follow
LEAST_COLUMNS = 64  # of a piece: two cache lines of each row
PIECES = 2  # for each thread, at least
COLUMNS = 1024  # of a piece at most, whose sums (4 KB a token) and eight rows (16 KB) stay in the first cache


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
def _add_rows_twice(w, row, start, stop, x, totals):
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
    total, total1 = totals[0], totals[1]
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
def _columns(w, x, start, stop, totals):
    """`totals = x @ w[:, start:stop]`; the rows at hand come from memory once and stay in the first cache."""
    whole, tokens = w.shape[0] // ROWS * ROWS, len(x)
    totals[:] = np.float32(0)
    for row in range(0, whole, ROWS):
        for token in range(0, tokens - 1, 2):
            _add_rows_twice(w, row, start, stop, x[token : token + 2], totals[token : token + 2])
        if tokens % 2:
            _add_rows(w, row, start, stop, x[tokens - 1], totals[tokens - 1])
    for row in range(whole, w.shape[0]):
        for token in range(tokens):
            _add_row(w, row, start, stop, x[token, row], totals[token])


@compiled
def _product(taken, w, x, y, each):
    """y = x @ w: a piece is `each` columns."""
    totals = np.empty((len(x), each), np.float32)
    start = take(taken) * each
    while start < w.shape[1]:
        stop = min(start + each, w.shape[1])
        _columns(w, x, start, stop, totals)
        y[:, start:stop] = totals[:, : stop - start]
        start = take(taken) * each


def product(
    w: UInt16[np.ndarray, "in out"], x: Float32[np.ndarray, "t in"], y: Float32[np.ndarray, "t out"]
) -> None:
    """Writes `x @ w` into `y`; `w` are the bits of bfloat16 numbers. Threads take columns."""
    share(_product, w, x, y, min(COLUMNS, max(LEAST_COLUMNS, -(-w.shape[1] // (PIECES * threads())))))


def compile_product() -> None:
    """Compiles it: seconds once, later runs find it in numba's cache."""
    w, x, y = np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    for array in (w, x):
        array.flags.writeable = False
    product(w, x, y)
