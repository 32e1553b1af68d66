"""Batches of one shape from examples of uneven length, so that a jitted step compiles once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from qmoe_jax.data.examples import Examples


class Batch(NamedTuple):
    """Examples as padded rows.

    Attributes:
        encoder: encoder ids.
        decoder: decoder ids.
        encoder_mask: False on the encoder's padding, by each row's length: the padding id may occur in a
            text.
        lengths: decoder tokens of each row, start token included; 0 for rows beyond the last example.
        start: index of the batch's first example.
    """

    encoder: Int32[np.ndarray, "row n"]
    decoder: Int32[np.ndarray, "row m"]
    encoder_mask: Bool[np.ndarray, "row n"]
    lengths: Int32[np.ndarray, "row"]
    start: int


def round_up(value: int, multiple: int) -> int:
    """Round `value` up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


def pad_rows(
    rows: Sequence[np.ndarray], count: int, length: int, pad_id: int
) -> Int32[np.ndarray, "row token"]:
    """Return rows of ids as one array `[count, length]`, padded with `pad_id`.

    Raises:
        ValueError: a row is longer than `length`.
    """
    out = np.full((count, length), pad_id, np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"example {i}: expected at most {length} tokens, found {len(row)}")
        out[i, : len(row)] = row
    return out


def row_mask(rows: Sequence[np.ndarray], count: int, length: int) -> Bool[np.ndarray, "row token"]:
    """Return the mask of the rows that `pad_rows` returns: True on tokens, False on padding."""
    lengths = np.zeros(count, np.int64)
    lengths[: len(rows)] = [len(row) for row in rows]
    return np.arange(length) < lengths[:, None]


def batches(examples: Examples, batch_size: int, pad_id: int, multiple: int = 16) -> Iterator[Batch]:
    """Yield `examples` in order as batches of one shape: the largest lengths, rounded up to `multiple`."""
    encoder_length = round_up(max(len(encoder) for encoder, _ in examples), multiple)
    decoder_length = round_up(max(len(decoder) for _, decoder in examples), multiple)
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        encoders, decoders = [encoder for encoder, _ in rows], [decoder for _, decoder in rows]
        lengths = np.zeros(batch_size, np.int32)
        lengths[: len(rows)] = list(map(len, decoders))
        yield Batch(
            pad_rows(encoders, batch_size, encoder_length, pad_id),
            pad_rows(decoders, batch_size, decoder_length, pad_id),
            row_mask(encoders, batch_size, encoder_length),
            lengths,
            start,
        )
