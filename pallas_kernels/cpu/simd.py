"""Short vectors of float32 as values of compiled code, kept in registers.

numba leaves loops over a short fixed length to LLVM's vectorizer, which checks for overlapping arrays on
every entry and keeps sums in memory. Naming the vectors makes the loops of `inner_loop` five times faster.
LLVM splits a vector of 64 lanes into as many registers as the processor needs: four of AVX-512, eight of
AVX2.

Every function here is for compiled code; nothing checks bounds.
"""

from __future__ import annotations

from typing import Any

import numba.extending
from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import register_model

_FLAGS = ("contract", "nsz")

intrinsic: Any = numba.extending.intrinsic  # its result is called without the first parameter, `typing`


class Vector(types.Type):
    """The numba type of a vector of `lanes` float32 numbers."""

    def __init__(self, lanes: int) -> None:
        super().__init__(name=f"Float32x{lanes}")
        self.lanes = lanes
        self.llvm = ir.VectorType(ir.FloatType(), lanes)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, type_.llvm)


def _address(context, builder, array_type, array, index, vector):
    start = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(start, [index]), vector.llvm.as_pointer())


@intrinsic(prefer_literal=True)
def zeros(typing, lanes):
    """`zeros(16)`: a vector of 16 zeros; the number is a literal."""
    vector = Vector(lanes.literal_value)
    zero = ir.Constant(vector.llvm, [0.0] * vector.lanes)
    return vector(lanes), lambda context, builder, signature, args: zero


@intrinsic
def load(typing, like, array, index):
    """`load(like, array, index)`: a vector of `array[index : index + like.lanes]`, contiguous float32 [n]."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[1], args[1], args[2], like)
        return builder.load(address, align=4)

    return like(like, array, types.uintp), generate


@intrinsic
def store(typing, array, index, value):
    """`store(array, index, value)`: write a vector to `array[index : index + lanes]`."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], args[0], args[1], value)
        builder.store(args[2], address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.uintp, value), generate


@intrinsic
def multiply_add(typing, scalar, vector, total):
    """`multiply_add(scalar, vector, total)`: `total + scalar * vector`."""

    def generate(context, builder, signature, args):
        scalar_, vector_, total_ = args
        undefined = ir.Constant(vector.llvm, ir.Undefined)
        first = builder.insert_element(undefined, scalar_, ir.Constant(ir.IntType(32), 0))
        every = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
        spread = builder.shuffle_vector(first, undefined, every)
        return builder.fadd(builder.fmul(spread, vector_, flags=_FLAGS), total_, flags=_FLAGS)

    return vector(types.float32, vector, vector), generate


@intrinsic
def add(typing, left, right):
    """`add(left, right)`: the sum of two vectors."""
    return left(left, left), lambda context, builder, signature, args: builder.fadd(*args, flags=_FLAGS)


@intrinsic(prefer_literal=True)
def lane(typing, vector, number):
    """`lane(vector, 1)`: one number of a vector; the index is a literal."""
    index = ir.Constant(ir.IntType(32), number.literal_value)
    signature = types.float32(vector, number)
    return signature, lambda context, builder, signature, args: builder.extract_element(args[0], index)


@intrinsic
def widen(typing, bits):
    """`widen(bits)`: the float32 whose upper half these bits, of a bfloat16 as uint16, are."""

    def generate(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate
