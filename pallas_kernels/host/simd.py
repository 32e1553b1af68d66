"""Sixteen float32 numbers as one value in compiled code, kept in vector registers.

numba's loops over a short fixed length are left to LLVM's vectorizer, which checks for overlapping arrays on
every entry and keeps sums in memory. Naming the vectors makes the loops of `rows.py` five times faster.
"""

from __future__ import annotations

from typing import Any

import numba.extending
from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import register_model

LANES = 16  # one AVX-512 register, two of AVX2, four of SSE or NEON

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)
_UNDEFINED = ir.Constant(_VECTOR, ir.Undefined)
_FLAGS = ("contract", "nsz")

intrinsic: Any = numba.extending.intrinsic  # what it makes is called without the first parameter, `typing`


class Float32x16(types.Type):
    """The type of such a value."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


float32x16 = Float32x16()


@register_model(Float32x16)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, _VECTOR)


def _address(context, builder, array_type, array, index):
    start = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(start, [index]), _VECTOR.as_pointer())


@intrinsic
def zeros(typing):
    """`zeros()`: sixteen zeros."""
    return float32x16(), lambda context, builder, signature, args: _ZEROS


@intrinsic
def load(typing, array, index):
    """`load(array, index)`: `array[index : index + 16]` of a contiguous 1-D float32 array, unchecked."""

    def generate(context, builder, signature, args):
        return builder.load(_address(context, builder, signature.args[0], *args), align=4)

    return float32x16(array, types.uintp), generate


@intrinsic
def store(typing, array, index, value):
    """`store(array, index, value)`: the reverse of `load`."""

    def generate(context, builder, signature, args):
        array_, index_, value_ = args
        builder.store(value_, _address(context, builder, signature.args[0], array_, index_), align=4)
        return context.get_dummy_value()

    return types.void(array, types.uintp, float32x16), generate


@intrinsic
def multiply_add(typing, scalar, vector, total):
    """`multiply_add(scalar, vector, total)`: total + scalar * vector."""

    def generate(context, builder, signature, args):
        scalar_, vector_, total_ = args
        lane = ir.Constant(ir.IntType(32), 0)
        first = builder.insert_element(_UNDEFINED, scalar_, lane)
        every = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        spread = builder.shuffle_vector(first, _UNDEFINED, every)
        return builder.fadd(builder.fmul(spread, vector_, flags=_FLAGS), total_, flags=_FLAGS)

    return float32x16(types.float32, float32x16, float32x16), generate


@intrinsic
def add(typing, left, right):
    """`add(left, right)`: their sum, lane by lane."""

    def generate(context, builder, signature, args):
        return builder.fadd(*args, flags=_FLAGS)

    return float32x16(float32x16, float32x16), generate
