"""Packed experts times blocks of tokens: the kernel under every product on a CPU."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float32

from pallas_kernels.cpu.codebook_tables import stream
from pallas_kernels.cpu.compiled import compiled, threads
from pallas_kernels.cpu.inner_loop import multiply_rows
from pallas_kernels.cpu.threads import share, take
from pallas_kernels.cpu.token_blocks import ALONE, SLACK, Blocks, one_token_each
from pallas_kernels.operands import DecodeTable, PackedMatrix

ACTIVATIONS = ("linear", "relu", "gelu")
_LINEAR, _RELU, _GELU = range(3)

_LEAST_ROWS = 32  # of a piece
_PIECES = 8  # for each thread: the last to finish is then late by a small part


@compiled
def _activate(y, activation):
    for i in range(len(y)):
        v = y[i]
        if activation == _RELU:
            y[i] = max(v, np.float32(0))
        elif activation == _GELU:  # the tanh form, as jax.nn.gelu
            inner = np.float32(0.7978845608028654) * (v + np.float32(0.044715) * v * v * v)
            y[i] = np.float32(0.5) * v * (np.float32(1) + np.tanh(inner))


@compiled
def _product(taken, matrix, blocks, x, y, activation):
    """y = activation(W x): a piece is some rows of a block."""
    expert, lanes, first, each = blocks
    rows, width = matrix.offsets.shape[1] - 1, matrix.width
    pieces = -(-rows // each)
    number = take(taken)
    while number < len(expert) * pieces:
        block, low = number // pieces, number % pieces * each
        high = min(low + each, rows)
        x_block = x[first[block] * (width + SLACK) : first[block + 1] * (width + SLACK)]
        y_block = y[first[block] * (rows + SLACK) : first[block + 1] * (rows + SLACK)]
        multiply_rows(matrix, expert[block], (low, high), lanes[block], x_block, y_block)
        if activation != _LINEAR:
            size = max(lanes[block], ALONE)
            _activate(y_block[low * size : high * size], activation)
        number = take(taken)


def product(
    packed: PackedMatrix, blocks: Blocks, x: Float32[np.ndarray, "number"], activation: str = "linear"
) -> Float32[np.ndarray, "result"]:
    """The experts of `blocks` times `x`, which lies over the blocks as `Blocks` says; the result does too.

    The arrays of `packed` are NumPy's, anywhere in memory: they are read where they are. Experts in
    `blocks` must exist. `activation` is one of `ACTIVATIONS` ("gelu" in its tanh form).
    """
    y = blocks.empty(packed.rows)
    rows = max(_LEAST_ROWS, packed.rows // (_PIECES * threads()))
    where = blocks.expert, blocks.lanes, blocks.first, rows
    share(_product, stream(packed), where, x, y, ACTIVATIONS.index(activation))
    return y


def compile_for(packed: PackedMatrix) -> None:
    """Compiles what `product` needs for such operands: seconds once, later runs find it in numba's cache.

    Called while tracing, so that no step has to wait for it.
    """
    table = packed.table
    _compile(np.dtype(packed.codes.dtype), table.field_bits, table.slots, table.words)


@functools.lru_cache
def _compile(code: np.dtype, field_bits: int, slots: int, words: int) -> None:
    table = DecodeTable(np.zeros((1, words), np.uint32), field_bits, slots, 1)
    codes, offsets = np.zeros((1, 1), code), np.zeros((1, 1), np.int32)
    packed = PackedMatrix(codes, offsets, np.zeros((1, 0, 2), np.float32), table, 1)
    nothing = one_token_each(np.zeros(0, np.int32))
    none = np.zeros((0, 1), np.float32)
    nothing.collect(product(packed, nothing, nothing.spread(none)), np.zeros(0, np.float32), none)
