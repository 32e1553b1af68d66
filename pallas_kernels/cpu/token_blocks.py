"""Tokens laid out for the row kernels: grouped by expert, in blocks of lanes that share one pass over the
codewords."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32, Int64

from pallas_kernels.cpu.codebook_tables import frozen
from pallas_kernels.cpu.compiled import compiled
from pallas_kernels.cpu.threads import share, take

# Zeros behind each block's columns: several codewords are read at a time without a check of the position in
# between (rows.py), and the tail of the last codeword multiplies zeros.
SLACK = 512

MAX_LANES = 64
ALONE = 3  # numbers of a column in a block of one token
ALONE_PLACE = 2  # where the token's number sits among them, the others being zero: see rows.py

_COLUMNS = 512  # columns of a piece of copying
_LINE = 16  # numbers of a cache line: columns transposed at a time, and where lanes begin in memory
_WORTH_SHARING = 1 << 16  # numbers: copying fewer takes less time than to wake a thread


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which token sits where.

    A block holds up to 1, 8, 16, 32 or 64 tokens of one expert, side by side as lanes. Data over blocks is
    one flat array: a block of `width` columns lies at `first * (width + SLACK)` as [width, lanes], a block of
    one token as [width, ALONE].

    Attributes:
      expert: the expert of each block.
      lanes: lanes of each block.
      first: lanes before each block, one token counting as `ALONE`, and at last their number.
      bound: tokens before each block, and at last their number.
      token: the tokens, block by block.
    """

    expert: Int32[np.ndarray, "block"]
    lanes: Int32[np.ndarray, "block"]
    first: Int64[np.ndarray, "bound"]
    bound: Int64[np.ndarray, "bound"]
    token: Int64[np.ndarray, "t"]

    def empty(self, width: int) -> Float32[np.ndarray, "number"]:
        """Zeros for data over these blocks; pages never written are never touched."""
        size = int(self.first[-1]) * (width + SLACK)
        room = np.zeros(size + _LINE, np.float32)
        start = -room.ctypes.data // room.itemsize % _LINE
        return room[start : start + size]

    def spread(self, x: Float32[np.ndarray, "t width"]) -> Float32[np.ndarray, "number"]:
        """The tokens' rows, laid out in blocks."""
        data = self.empty(x.shape[1])
        self._copy(_spread, frozen(x), data)
        return data

    def collect(
        self,
        data: Float32[np.ndarray, "number"],
        scale: Float32[np.ndarray, "t"],
        y: Float32[np.ndarray, "t width"],
    ) -> None:
        """The reverse of `spread`, into `y`, each token's row times its `scale`."""
        self._copy(_collect, y, data, frozen(scale))

    def _copy(self, kernel, rows: Float32[np.ndarray, "t width"], *others: np.ndarray) -> None:
        where = self.lanes, self.first, self.bound, self.token
        if rows.size < _WORTH_SHARING:
            kernel(np.zeros(1, np.int64), where, rows, *others)
        else:
            share(kernel, where, rows, *others)


def one_token_each(expert_index: Int32[np.ndarray, "t"]) -> Blocks:
    """A block for each token."""
    token = np.arange(len(expert_index) + 1)
    lanes = np.ones(len(expert_index), np.int32)
    return Blocks(expert_index.copy(), lanes, token * ALONE, token, token[:-1])


def grouped(expert_index: Int32[np.ndarray, "t"]) -> Blocks:
    """Tokens of one expert share blocks: whole ones of 64 lanes, then the smallest that holds the rest."""
    token = np.argsort(expert_index, kind="stable")
    expert, lanes, first, bound = _plan(expert_index[token])
    return Blocks(expert, lanes, first, bound, token)


@compiled
def _plan(sorted_index):
    """(expert, lanes, first, bound) of the blocks."""
    tokens, blocks = len(sorted_index), 0
    expert, lanes = np.empty(tokens, np.int32), np.empty(tokens, np.int32)
    first, bound = np.zeros(tokens + 1, np.int64), np.zeros(tokens + 1, np.int64)
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
        begin = min(block_lanes, _LINE)  # a load of lanes that crosses cache lines takes twice as long
        first[blocks] += -first[blocks] % begin
        first[blocks + 1] = first[blocks] + max(block_lanes, ALONE)
        bound[blocks + 1] = stop
        blocks, start = blocks + 1, stop
    return expert[:blocks], lanes[:blocks], first[: blocks + 1], bound[: blocks + 1]


@compiled
def _piece(number, where, width):
    """(block, its tokens, where its data begin, numbers of a column, the first one's place, columns) of a piece."""
    lanes, first, bound, _ = where
    pieces = -(-width // _COLUMNS)
    block, left = number // pieces, number % pieces * _COLUMNS
    size, place = (lanes[block], 0) if lanes[block] > 1 else (ALONE, ALONE_PLACE)
    tokens = bound[block], bound[block + 1]
    return tokens, first[block] * (width + SLACK) + place, size, (left, min(left + _COLUMNS, width))


@compiled
def _spread(taken, where, x, data):
    width, token = x.shape[1], where[3]
    number = take(taken)
    while number < len(where[0]) * -(-width // _COLUMNS):
        tokens, start, size, columns = _piece(number, where, width)
        for left in range(columns[0], columns[1], _LINE):
            for i in range(tokens[0], tokens[1]):
                for column in range(left, min(left + _LINE, columns[1])):
                    data[start + column * size + i - tokens[0]] = x[token[i], column]
        number = take(taken)


@compiled
def _collect(taken, where, y, data, scale):
    width, token = y.shape[1], where[3]
    number = take(taken)
    while number < len(where[0]) * -(-width // _COLUMNS):
        tokens, start, size, columns = _piece(number, where, width)
        for left in range(columns[0], columns[1], _LINE):
            for i in range(tokens[0], tokens[1]):
                for column in range(left, min(left + _LINE, columns[1])):
                    y[token[i], column] = scale[token[i]] * data[start + column * size + i - tokens[0]]
        number = take(taken)
