"""Tokens laid out for the row kernels: grouped by expert, in blocks of lanes that share one pass over the
codewords."""

from __future__ import annotations

import dataclasses
import functools

import numba
import numpy as np
from jaxtyping import Float32, Int32, Int64

from pallas_kernels.host.compiled import parallel

# Zeros behind each block's columns: where rows are short, all their codewords can then be read without a
# check of the position (rows.py), and the tail of the last codeword multiplies zeros.
SLACK = 1024

MAX_LANES = 64
SINGLES = 2  # tokens for which a pass each costs less than one pass over sixteen lanes
_COLUMNS = 16  # columns transposed at a time: a cache line of float32


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which token sits where.

    A block is 1, 16, 32 or 64 neighbouring lanes of one expert. Data over blocks is one flat array: a block
    whose first lane is f, over `width` columns, lies at `f * (width + SLACK)` as [width, lanes].

    Attributes:
      expert: the expert of each block.
      lanes: lanes of each block.
      first: first lane of each block.
      token: the token in each lane, -1 where it is empty.
    """

    expert: Int32[np.ndarray, "block"]
    lanes: Int32[np.ndarray, "block"]
    first: Int64[np.ndarray, "block"]
    token: Int32[np.ndarray, "lane"]

    def empty(self, width: int) -> Float32[np.ndarray, "number"]:
        """Zeros for data over these blocks; pages never written are never touched."""
        return np.zeros(len(self.token) * (width + SLACK), np.float32)

    def spread(self, x: Float32[np.ndarray, "t width"]) -> Float32[np.ndarray, "number"]:
        """The tokens' rows, laid out in blocks."""
        data = self.empty(x.shape[1])
        if self._rows_are_lanes:
            data.reshape(len(x), -1)[:, : x.shape[1]] = x[self.token]
        else:
            _spread(x, (self.lanes, self.first, self.token), data)
        return data

    def collect(
        self,
        data: Float32[np.ndarray, "number"],
        scale: Float32[np.ndarray, "t"],
        y: Float32[np.ndarray, "t width"],
    ) -> None:
        """The reverse of `spread`, into `y`, each token's row times its `scale`."""
        if self._rows_are_lanes:
            y[self.token] = data.reshape(len(y), -1)[:, : y.shape[1]] * scale[self.token, None]
        else:
            _collect(data, (self.lanes, self.first, self.token), scale, y)

    @functools.cached_property
    def _rows_are_lanes(self) -> bool:
        """Every block is one lane: the layout is a matrix, and NumPy copies that before threads wake up."""
        return len(self.lanes) == len(self.token) > 0


def one_token_each(expert_index: Int32[np.ndarray, "t"]) -> Blocks:
    """A block for each token."""
    tokens = len(expert_index)
    lanes, lane = np.ones(tokens, np.int32), np.arange(tokens)
    return Blocks(np.ascontiguousarray(expert_index), lanes, lane, lane.astype(np.int32))


def grouped(expert_index: Int32[np.ndarray, "t"]) -> Blocks:
    """Tokens of one expert share blocks: whole ones of 64 lanes, then the smallest that holds the rest."""
    experts, counts = np.unique(expert_index, return_counts=True)
    full, rest = np.divmod(counts, MAX_LANES)
    blocks = full + np.where(rest <= SINGLES, rest, 1)
    group = np.repeat(np.arange(len(experts)), blocks)
    rank = np.arange(len(group)) - (np.cumsum(blocks) - blocks)[group]
    lanes = np.where(rank < full[group], MAX_LANES, _rest_lanes(rest)[group]).astype(np.int32)
    first = np.cumsum(lanes, dtype=np.int64) - lanes
    # Lanes fill in order, so a token's lane is its rank in the group after the group's first lane.
    order = np.argsort(expert_index, kind="stable")
    begin = first[np.cumsum(blocks) - blocks] - (np.cumsum(counts) - counts)
    token = np.full(int(lanes.sum()), -1, np.int32)
    token[np.arange(len(order)) + np.repeat(begin, counts)] = order
    return Blocks(experts[group].astype(np.int32), lanes, first, token)


def _rest_lanes(rest: Int64[np.ndarray, "group"]) -> Int64[np.ndarray, "group"]:
    """Lanes of the block for the `rest` tokens that fill no whole one."""
    return np.select([rest <= SINGLES, rest <= 16, rest <= 32], [1, 16, 32], MAX_LANES)


@parallel
def _spread(x, blocks, data):
    lanes, first, token = blocks
    width = x.shape[1]
    for block in numba.prange(len(lanes)):
        count, start = lanes[block], first[block] * (width + SLACK)
        for left in range(0, width, _COLUMNS):
            for lane in range(count):
                t = token[first[block] + lane]
                if t >= 0:
                    for column in range(left, min(left + _COLUMNS, width)):
                        data[start + column * count + lane] = x[t, column]


@parallel
def _collect(data, blocks, scale, y):
    lanes, first, token = blocks
    width = y.shape[1]
    for block in numba.prange(len(lanes)):
        count, start = lanes[block], first[block] * (width + SLACK)
        for left in range(0, width, _COLUMNS):
            for lane in range(count):
                t = token[first[block] + lane]
                if t >= 0:
                    for column in range(left, min(left + _COLUMNS, width)):
                        y[t, column] = scale[t] * data[start + column * count + lane]
