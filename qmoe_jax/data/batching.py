"""Batches of one shape from examples of uneven length, so that a jitted step compiles once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from qmoe_jax.data.examples import Examples


class Batch(NamedTuple):
    """Examples as rows padded with 0.

    Attributes:
        encoder: encoder ids.
        decoder: decoder ids.
        lengths: decoder tokens of each row, start token included, since an id of 0 inside a text is not
            padding; 0 for rows beyond the last example.
        start: index of the batch's first example.
    """

    encoder: Int32[np.ndarray, "row n"]
    decoder: Int32[np.ndarray, "row m"]
    lengths: Int32[np.ndarray, "row"]
    start: int


def round_up(value: int, multiple: int) -> int:
    """Round `value` up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


def pad_rows(rows: Sequence[np.ndarray], count: int, length: int) -> Int32[np.ndarray, "row token"]:
    """Return rows of ids as one array `[count, length]`, padded with 0.

    Raises:
        ValueError: a row is longer than `length`.
    """
    out = np.zeros((count, length), np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"example {i}: expected at most {length} tokens, found {len(row)}")
        out[i, : len(row)] = row
    return out


def batches(examples: Examples, batch_size: int, multiple: int = 16) -> Iterator[Batch]:
    """Yield `examples` in order as batches of one shape: the largest lengths, rounded up to `multiple`."""
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
