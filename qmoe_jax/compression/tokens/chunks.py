"""The tokens of expert groups in chunks of one shape, so that a step compiles once and memory is bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from qmoe_jax.compression.tokens.routing import GroupTokens
from qmoe_jax.compression.tokens.store import TokenStore
from qmoe_jax.config import SwitchConfig

CHUNKS_AHEAD = 2
"""Chunks of tokens that are read before they are computed on: 34 MB each on every device, for c-2048."""

HIDDEN_BYTES = 1 << 27
"""Bytes of the float32 activations inside the experts, of one chunk: for c-2048 4,096 tokens."""

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Hidden states, float32 `[token, embed]`, expert, int32 `[token]`, and router probability of some tokens."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of several groups, the same number of each.

    Attributes:
        x: hidden states, an array per device.
        expert: counted from the group's first expert; -1 beyond the group's last token.
        probability: the router probability.
        valid: tokens of each group that are in the chunk.
    """

    x: list[Float32[np.ndarray, "token embed"]]
    expert: list[Int32[np.ndarray, "token"]]
    probability: list[Float32[np.ndarray, "token"]]
    valid: list[int]


def most_rows(model: SwitchConfig) -> int:
    """Return the largest number of tokens in a chunk: a power of two whose activations fit `HIDDEN_BYTES`."""
    return max(16, 1 << (HIDDEN_BYTES // (4 * model.d_ff)).bit_length() - 1)


def group_rows(
    store: TokenStore, group: int, tokens: GroupTokens, rows: int, *, calibrating: bool
) -> Iterator[Rows]:
    """Yield the tokens of a group in order, `rows` of them at a time, fewer at last.

    Args:
        store: where their states are read.
        group: number of the group.
        tokens: where the router sent them.
        rows: tokens at a time.
        calibrating: only those that calibrate.

    Raises:
        CheckpointError: the states are damaged.
    """
    kept: list[Rows] = []
    count = done = 0
    for slab in store.slabs(group):
        for x in store.pieces(group, slab, rows):
            part = slice(done, done + len(x))
            done += len(x)
            piece = (x, tokens.expert[part], tokens.probability[part])
            if calibrating and not (chosen := tokens.calibrates[part]).all():
                piece = (x[chosen], piece[1][chosen], piece[2][chosen])
            kept.append(piece)
            count += len(piece[0])
            while count >= rows:
                states, expert, probability = _joined(kept)
                yield states[:rows], expert[:rows], probability[:rows]
                kept, count = [(states[rows:], expert[rows:], probability[rows:])], count - rows
    if count:
        yield _joined(kept)


def side_by_side(groups: Sequence[Iterator[Rows]], rows: int, features: int, devices: int) -> Iterator[Chunk]:
    """Yield chunks of several groups together, one per device, until the last group has no more tokens."""
    none = (np.zeros((0, features), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    while True:
        taken = [next(group, None) for group in groups]
        if all(part is None for part in taken):
            return
        chunk = Chunk([], [], [], [])
        for x, expert, probability in [part or none for part in [*taken, *[None] * (devices - len(taken))]]:
            pad = rows - len(x)
            chunk.x.append(np.pad(x, ((0, pad), (0, 0))) if pad else x)
            chunk.expert.append(np.pad(expert, (0, pad), constant_values=-1))
            chunk.probability.append(np.pad(probability, (0, pad)))
            chunk.valid.append(len(x))
        yield chunk


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    x, expert, probability = zip(*parts, strict=True)
    return np.concatenate(x), np.concatenate(expert), np.concatenate(probability)
