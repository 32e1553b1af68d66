"""A row's nonzeros times a block of tokens: `y[lane]` is the sum of `values[i] * x[positions[i], lane]`."""

from __future__ import annotations

import numpy as np

from pallas_kernels.host import simd
from pallas_kernels.host.compiled import compiled

_index = np.uintp


@compiled
def _gather16(source, nonzeros, target):
    """Four sums in turn: an addition takes four cycles, and a nonzero has work for one."""
    (x, x_start), (positions, values, count) = source, nonzeros
    a, b, c, d = simd.zeros(), simd.zeros(), simd.zeros(), simd.zeros()
    begin, i, lanes = _index(x_start), _index(0), _index(16)
    while i + _index(4) <= count:
        j, k, m = i + _index(1), i + _index(2), i + _index(3)
        a = simd.multiply_add(values[i], simd.load(x, begin + _index(positions[i]) * lanes), a)
        b = simd.multiply_add(values[j], simd.load(x, begin + _index(positions[j]) * lanes), b)
        c = simd.multiply_add(values[k], simd.load(x, begin + _index(positions[k]) * lanes), c)
        d = simd.multiply_add(values[m], simd.load(x, begin + _index(positions[m]) * lanes), d)
        i += _index(4)
    while i < count:
        a = simd.multiply_add(values[i], simd.load(x, begin + _index(positions[i]) * lanes), a)
        i += _index(1)
    simd.store(target[0], _index(target[1]), simd.add(simd.add(a, b), simd.add(c, d)))


@compiled
def _gather32(source, nonzeros, target):
    (x, x_start), (positions, values, count), (y, y_start) = source, nonzeros, target
    a, b, c, d = simd.zeros(), simd.zeros(), simd.zeros(), simd.zeros()
    begin, i, half = _index(x_start), _index(0), _index(16)
    while i + _index(2) <= count:
        value, column = values[i], begin + _index(positions[i]) * _index(32)
        a = simd.multiply_add(value, simd.load(x, column), a)
        b = simd.multiply_add(value, simd.load(x, column + half), b)
        value, column = values[i + _index(1)], begin + _index(positions[i + _index(1)]) * _index(32)
        c = simd.multiply_add(value, simd.load(x, column), c)
        d = simd.multiply_add(value, simd.load(x, column + half), d)
        i += _index(2)
    if i < count:
        column = begin + _index(positions[i]) * _index(32)
        a = simd.multiply_add(values[i], simd.load(x, column), a)
        b = simd.multiply_add(values[i], simd.load(x, column + half), b)
    simd.store(y, _index(y_start), simd.add(a, c))
    simd.store(y, _index(y_start) + half, simd.add(b, d))


@compiled
def _gather64(source, nonzeros, target):
    (x, x_start), (positions, values, count), (y, y_start) = source, nonzeros, target
    a, b, c, d = simd.zeros(), simd.zeros(), simd.zeros(), simd.zeros()
    begin = _index(x_start)
    for n in range(count):
        value, column = values[_index(n)], begin + _index(positions[_index(n)]) * _index(64)
        a = simd.multiply_add(value, simd.load(x, column), a)
        b = simd.multiply_add(value, simd.load(x, column + _index(16)), b)
        c = simd.multiply_add(value, simd.load(x, column + _index(32)), c)
        d = simd.multiply_add(value, simd.load(x, column + _index(48)), d)
    simd.store(y, _index(y_start), a)
    simd.store(y, _index(y_start) + _index(16), b)
    simd.store(y, _index(y_start) + _index(32), c)
    simd.store(y, _index(y_start) + _index(48), d)


@compiled
def gather(lanes, source, nonzeros, target):
    """The sums for a block of 16, 32 or 64 lanes.

    `source` is (x, where the block's [columns, lanes] begin in it), `nonzeros` (positions, values, their
    number), `target` (y, where the sums go).
    """
    if lanes == 16:
        _gather16(source, nonzeros, target)
    elif lanes == 32:
        _gather32(source, nonzeros, target)
    else:
        _gather64(source, nonzeros, target)
