"""Products with matrices kept in bfloat16, widened in registers: half the bytes of float32, and bytes are the limit."""

from __future__ import annotations

from typing import Any

import numba
import numba.extending
import numpy as np
from jaxtyping import Float32, UInt16
from llvmlite import ir
from numba.core import types

from pallas_kernels.host.compiled import compiled, parallel, threads

ROWS = 8  # of the matrix, read side by side: as many streams as the processor's prefetchers follow
COLUMNS = 1024  # whose sums (4 KB a token) and widened rows (32 KB) stay in the first caches

intrinsic: Any = numba.extending.intrinsic


@intrinsic
def _widen(typing, bits):
    """`_widen(bits)`: the float32 whose upper half these bits are."""

    def generate(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


# An array is cut to the columns at hand before a loop over them: an index that begins at 0 is one that LLVM knows not to
# wrap around, and then it works on whole vectors.


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
def _add_widened(wide, count, x, row, total):
    """The same from rows that have been widened."""
    a, b, c, d = wide[0, :count], wide[1, :count], wide[2, :count], wide[3, :count]
    e, f, g, h = wide[4, :count], wide[5, :count], wide[6, :count], wide[7, :count]
    p, q, r, s = x[row], x[row + 1], x[row + 2], x[row + 3]
    t, u, v, z = x[row + 4], x[row + 5], x[row + 6], x[row + 7]
    for j in range(count):
        total[j] += (p * a[j] + q * b[j] + r * c[j] + s * d[j]) + (t * e[j] + u * f[j] + v * g[j] + z * h[j])


@compiled
def _widen_row(w, row, start, stop, wide):
    source = w[row, start:stop]
    for j in range(stop - start):
        wide[j] = _widen(source[j])


@compiled
def _add_row(wide, count, x, total):
    """One row, for what is left over."""
    for j in range(count):
        total[j] += x * wide[j]


@compiled
def _columns(w, x, start, stop, wide, totals):
    """`totals = x @ w[:, start:stop]`."""
    whole, count = w.shape[0] // ROWS * ROWS, stop - start
    totals[:] = np.float32(0)
    for row in range(0, whole, ROWS):
        if len(x) == 1:
            _add_rows(w, row, start, stop, x[0], totals[0])
        else:
            for k in range(ROWS):
                _widen_row(w, row + k, start, stop, wide[k])
            for token in range(len(x)):
                _add_widened(wide, count, x[token], row, totals[token])
    for row in range(whole, w.shape[0]):
        _widen_row(w, row, start, stop, wide[0])
        for token in range(len(x)):
            _add_row(wide[0], count, x[token, row], totals[token])


@parallel
def _product(w, x, y, parts):
    width = w.shape[1]
    for part in numba.prange(parts):
        wide = np.empty((ROWS, COLUMNS), np.float32)
        totals = np.empty((len(x), COLUMNS), np.float32)
        stop = width * (part + 1) // parts
        for start in range(width * part // parts, stop, COLUMNS):
            end = min(start + COLUMNS, stop)
            _columns(w, x, start, end, wide, totals)
            y[:, start:end] = totals[:, : end - start]


def product(
    w: UInt16[np.ndarray, "in out"], x: Float32[np.ndarray, "t in"], y: Float32[np.ndarray, "t out"]
) -> None:
    """Writes `x @ w` into `y`; `w` are the bits of bfloat16 numbers. A thread takes a share of the columns."""
    _product(w, x, y, threads())


def compile_product() -> None:
    """Compiles it: seconds once, later runs find it in numba's cache."""
    w, x, y = np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    for array in (w, x):
        array.flags.writeable = False
    product(w, x, y)
