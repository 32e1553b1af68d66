"""Tokens grouped by expert, in blocks of lanes that share one pass over the expert's codewords."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from pallas_kernels.cpu.compiled import compiled, read_only
from pallas_kernels.cpu.threads import next_chunk, parallel_for

# Columns of zeros behind each block: the inner loop reads several codewords without a check of the position
# in between, and the tail of a row's last codeword multiplies zeros.
SLACK_COLUMNS = 512

MAX_LANES = 64
SINGLE_STRIDE = 3  # numbers per column in a block of one token
SINGLE_OFFSET = 2  # index of the token's number among them, the others being zero; see inner_loop

_CHUNK_COLUMNS = 512
_LINE = 16  # numbers of a cache line: columns transposed at a time, and the alignment of lanes in memory
_WORTH_SHARING = 1 << 16  # numbers: copying fewer takes less time than waking a thread


class TokenBlocks(NamedTuple):
    """Assignment of tokens to blocks of 1, 8, 16, 32 or 64 lanes, each for tokens of one expert.

    Data over blocks is one flat float32 array: a block of `width` columns begins at
    `first_lane * (width + SLACK_COLUMNS)`, as [width, lanes] or, for one token, as [width, SINGLE_STRIDE].

    It is a NamedTuple, so that compiled code takes it as it is.

    Attributes:
        expert: int32 [block], the expert of each block.
        lanes: int32 [block], 1, 8, 16, 32 or 64.
        first_lane: int64 [block + 1], lanes before each block (a single one as `SINGLE_STRIDE`), then all.
        first_token: int64 [block + 1], index in `token` of each block's first one, then the number of tokens.
        token: int64 [token], the rows of the tokens in blocks, block by block.
    """

    expert: Any
    lanes: Any
    first_lane: Any
    first_token: Any
    token: Any

    @staticmethod
    def by_expert(
        expert_index: Int32[np.ndarray, "t"], tokens: Int64[np.ndarray, "some"] | None = None
    ) -> TokenBlocks:
        """Return the blocks of each expert's tokens: full ones of 64 lanes, then the smallest for the rest.

        Blocks are in the order of the experts, and the tokens of an expert in their own order. Given
        `tokens`, only these are in blocks.
        """
        if tokens is None:
            tokens = np.arange(len(expert_index))
        token = tokens[np.argsort(expert_index[tokens], kind="stable")]
        expert, lanes, first_lane, first_token = _cut_into_blocks(expert_index[token])
        return TokenBlocks(expert, lanes, first_lane, first_token, token)

    def empty(self, width: int) -> Float32[np.ndarray, "number"]:
        """Return zeros for `width` columns over these blocks; pages that are never written take no memory."""
        size = int(self.first_lane[-1]) * (width + SLACK_COLUMNS)
        memory = np.zeros(size + _LINE, np.float32)
        start = -memory.ctypes.data // memory.itemsize % _LINE
        return memory[start : start + size]

    def dispatch(self, x: Float32[np.ndarray, "t width"]) -> Float32[np.ndarray, "number"]:
        """Return the tokens' rows laid out in blocks."""
        data = self.empty(x.shape[1])
        self._copy(_dispatch_chunks, read_only(x), data)
        return data

    def combine(
        self,
        data: Float32[np.ndarray, "number"],
        scale: Float32[np.ndarray, "t"],
        y: Float32[np.ndarray, "t width"],
    ) -> None:
        """Write each token's row in the blocks, times its `scale`, to its row of `y`: `dispatch` reversed."""
        self._copy(_combine_chunks, y, data, read_only(scale))

    def _copy(self, body: Any, rows: Float32[np.ndarray, "t width"], *others: np.ndarray) -> None:
        if rows.size < _WORTH_SHARING:
            body(np.zeros(1, np.int64), self, rows, *others)
        else:
            parallel_for(body, self, rows, *others)


@compiled
def _cut_into_blocks(sorted_index):
    """Return (expert, lanes, first_lane, first_token) of the blocks of tokens that are sorted by expert."""
    tokens, blocks = len(sorted_index), 0
    expert, lanes = np.empty(tokens, np.int32), np.empty(tokens, np.int32)
    first_lane, first_token = np.zeros(tokens + 1, np.int64), np.zeros(tokens + 1, np.int64)
    start = 0
    while start < tokens:
        stop = start + 1
        while stop < tokens and sorted_index[stop] == sorted_index[start] and stop - start < MAX_LANES:
            stop += 1
        count = stop - start
        block_lanes = 1 if count == 1 else 8
        while block_lanes < count:
            block_lanes *= 2
        expert[blocks], lanes[blocks] = sorted_index[start], block_lanes
        alignment = min(block_lanes, _LINE)  # a load of lanes that crosses cache lines takes twice as long
        first_lane[blocks] += -first_lane[blocks] % alignment
        first_lane[blocks + 1] = first_lane[blocks] + max(block_lanes, SINGLE_STRIDE)
        first_token[blocks + 1] = stop
        blocks, start = blocks + 1, stop
    return expert[:blocks], lanes[:blocks], first_lane[: blocks + 1], first_token[: blocks + 1]


class _Chunk(NamedTuple):
    """Some columns of a block: that of token `first_token + i` is at `start + column * stride + i`."""

    first_token: int
    stop_token: int
    start: int
    stride: int
    first_column: int
    stop_column: int


@compiled
def _num_chunks(blocks, width):
    return len(blocks.lanes) * -(-width // _CHUNK_COLUMNS)


@compiled
def _chunk(blocks, width, number):
    chunks = -(-width // _CHUNK_COLUMNS)
    block, column = number // chunks, number % chunks * _CHUNK_COLUMNS
    lanes = blocks.lanes[block]
    stride, offset = (lanes, 0) if lanes > 1 else (SINGLE_STRIDE, SINGLE_OFFSET)
    return _Chunk(
        blocks.first_token[block],
        blocks.first_token[block + 1],
        blocks.first_lane[block] * (width + SLACK_COLUMNS) + offset,
        stride,
        column,
        min(column + _CHUNK_COLUMNS, width),
    )


@compiled
def _dispatch_chunks(counter, blocks, x, data):
    width, token = x.shape[1], blocks.token
    number = next_chunk(counter)
    while number < _num_chunks(blocks, width):
        chunk = _chunk(blocks, width, number)
        for line in range(chunk.first_column, chunk.stop_column, _LINE):
            for i in range(chunk.stop_token - chunk.first_token):
                row, start = token[chunk.first_token + i], chunk.start + i
                for column in range(line, min(line + _LINE, chunk.stop_column)):
                    data[start + column * chunk.stride] = x[row, column]
        number = next_chunk(counter)


@compiled
def _combine_chunks(counter, blocks, y, data, scale):
    width, token = y.shape[1], blocks.token
    number = next_chunk(counter)
    while number < _num_chunks(blocks, width):
        chunk = _chunk(blocks, width, number)
        for line in range(chunk.first_column, chunk.stop_column, _LINE):
            for i in range(chunk.stop_token - chunk.first_token):
                row, start = token[chunk.first_token + i], chunk.start + i
                for column in range(line, min(line + _LINE, chunk.stop_column)):
                    y[row, column] = scale[row] * data[start + column * chunk.stride]
        number = next_chunk(counter)
