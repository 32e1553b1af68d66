"""Packed matrices times blocks of tokens: the product under every op on a CPU."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float32

from pallas_kernels.cpu.compiled import compiled
from pallas_kernels.cpu.inner_loop import multiply_rows
from pallas_kernels.cpu.packed_view import view_packed
from pallas_kernels.cpu.threads import next_chunk, num_threads, parallel_for
from pallas_kernels.cpu.token_blocks import SINGLE_STRIDE, SLACK_COLUMNS, TokenBlocks
from pallas_kernels.operands import DecodeTable, PackedMatrix

ACTIVATIONS = ("linear", "relu", "gelu")
_LINEAR, _RELU, _GELU = range(3)

_LEAST_ROWS = 32  # of a chunk
_CHUNKS_PER_THREAD = 8  # per block: the last thread to finish is then late by a small part


def packed_product(
    packed: PackedMatrix,
    blocks: TokenBlocks,
    x: Float32[np.ndarray, "number"],
    activation: str = "linear",
) -> Float32[np.ndarray, "result"]:
    """Return activation(W x) of each block's expert and tokens, rows in parallel; from any thread.

    A row is summed in one order however many threads there are, so that the result has the same bits. It
    takes the memory of the result only.

    Args:
        packed: matrices [out, in] of NumPy arrays anywhere in memory, which are read where they lie.
        blocks: the tokens' blocks, of experts that `packed` has.
        x: [in] per token, laid out by `blocks`, as the result is with [out] per token.
        activation: one of `ACTIVATIONS`; "gelu" in its tanh form, as `jax.nn.gelu`.
    """
    y = blocks.empty(packed.rows)
    chunk_rows = max(_LEAST_ROWS, packed.rows // (_CHUNKS_PER_THREAD * num_threads()))
    number = ACTIVATIONS.index(activation)
    parallel_for(_multiply_chunks, view_packed(packed), blocks, chunk_rows, x, y, number)
    return y


@compiled
def _multiply_chunks(counter, matrix, blocks, chunk_rows, x, y, activation):
    """Compute chunks of `chunk_rows` rows of one block."""
    expert, lanes, first_lane = blocks.expert, blocks.lanes, blocks.first_lane
    rows, width = matrix.row_offsets.shape[1] - 1, matrix.width
    chunks = -(-rows // chunk_rows)
    chunk = next_chunk(counter)
    while chunk < len(expert) * chunks:
        block, first = chunk // chunks, chunk % chunks * chunk_rows
        stop = min(first + chunk_rows, rows)
        x_block = x[
            first_lane[block] * (width + SLACK_COLUMNS) : first_lane[block + 1] * (width + SLACK_COLUMNS)
        ]
        y_block = y[
            first_lane[block] * (rows + SLACK_COLUMNS) : first_lane[block + 1] * (rows + SLACK_COLUMNS)
        ]
        multiply_rows(matrix, expert[block], (first, stop), lanes[block], x_block, y_block)
        if activation != _LINEAR:
            stride = max(lanes[block], SINGLE_STRIDE)
            _activate(y_block[first * stride : stop * stride], activation)
        chunk = next_chunk(counter)


@compiled
def _activate(y, activation):
    for i in range(len(y)):
        v = y[i]
        if activation == _RELU:
            y[i] = max(v, np.float32(0))
        elif activation == _GELU:
            inner = np.float32(0.7978845608028654) * (v + np.float32(0.044715) * v * v * v)
            y[i] = np.float32(0.5) * v * (np.float32(1) + np.tanh(inner))


def precompile(packed: PackedMatrix) -> None:
    """Compile `packed_product` for such a matrix: takes seconds once, later runs read numba's cache.

    Call it while tracing, so that no step waits for it. `packed` may be traced: only dtypes and the table's
    form count.
    """
    table = packed.table
    _precompile(np.dtype(packed.codes.dtype), table.field_bits, table.slots, table.words)


@functools.lru_cache
def _precompile(code: np.dtype, field_bits: int, slots: int, words: int) -> None:
    table = DecodeTable(np.zeros((1, words), np.uint32), field_bits, slots, 1)
    codes, offsets = np.zeros((1, 1), code), np.zeros((1, 1), np.int32)
    packed = PackedMatrix(codes, offsets, np.zeros((1, 0, 2), np.float32), table, 1)
    blocks, no_tokens = TokenBlocks.by_expert(np.zeros(0, np.int32)), np.zeros((0, 1), np.float32)
    y = packed_product(packed, blocks, blocks.dispatch(no_tokens))
    blocks.combine(y, np.zeros(0, np.float32), no_tokens)
