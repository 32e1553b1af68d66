"""Examples of uneven length to batches of one shape, so that a jitted step compiles once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qmoe_jax.data.examples import Examples


class Batch(NamedTuple):
    """Rows padded with 0: `encoder` int32 `[row, n]`, `decoder` int32 `[row, m]`, `lengths` int32 `[row]`.

    `lengths` counts a row's decoder tokens, start token included: an id of 0 inside a text is not padding.
    Rows beyond the last example have length 0. `start` is the number of the batch's first example.
    """

    encoder: np.ndarray
    decoder: np.ndarray
    lengths: np.ndarray
    start: int


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def pad_rows(rows: Sequence[np.ndarray], count: int, length: int) -> np.ndarray:
    """Rows as one int32 array `[count, length]`, filled with 0.

    Raises:
        ValueError: a row is longer than `length`.
    """
    out = np.zeros((count, length), np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"example {i} has {len(row)} tokens; the batch is {length} wide")
        out[i, : len(row)] = row
    return out


def batches(examples: Examples, batch_size: int, multiple: int = 16) -> Iterator[Batch]:
    """Yield `examples` in order as batches of one shape: the longest lengths, rounded up to `multiple`."""
    encoder_length = round_up(max(len(encoder) for encoder, _ in examples), multiple)
    decoder_length = round_up(max(len(decoder) for _, decoder in examples), multiple)
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        lengths = np.zeros(batch_size, np.int32)
        lengths[: len(rows)] = [len(decoder) for _, decoder in rows]
        yield Batch(
            pad_rows([encoder for encoder, _ in rows], batch_size, encoder_length),
            pad_rows([decoder for _, decoder in rows], batch_size, decoder_length),
            lengths,
            start,
        )
