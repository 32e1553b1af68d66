"""Compact storage of small integers: packed bits (the lowest first), or the smallest dtype."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes that `count` numbers of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(numbers: UInt8[np.ndarray, "row count"], bits: int) -> UInt8[np.ndarray, "row bytes"]:
    """Pack each row on its own, the last byte filled up with zeros.

    Raises:
        ValueError: a number does not fit.
    """
    if numbers.size and numbers.max() >= 1 << bits:
        raise ValueError(f"expected numbers of {bits} bits, found {numbers.max()}")
    single = numbers[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1
    # Shape: [row, count, bits] -> [row, count * bits]
    return np.packbits(single.reshape(len(numbers), -1), axis=1, bitorder="little")


def unpack_bits(
    packed: UInt8[np.ndarray, "row bytes"], bits: int, count: int
) -> UInt8[np.ndarray, "row count"]:
    """Return the `count` numbers of each row that `pack_bits` packed."""
    single = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little")
    # Shape: [row, count * bits] -> [row, count, bits]
    return np.packbits(single.reshape(len(packed), count, bits), axis=2, bitorder="little")[:, :, 0]


def smallest_dtype(numbers: np.ndarray) -> np.dtype:
    """Return the smallest integer dtype that holds the numbers, unsigned where none is negative."""
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
    for name in ("uint8", "uint16", "uint32") if low >= 0 else ("int16", "int32"):
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return np.dtype(name)
    raise ValueError(f"expected integers of at most 32 bits, found {low} to {high}")
