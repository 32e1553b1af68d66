"""Upstream QMoE's dictionary: the 65,536 most probable runs of digit pairs (arXiv 2310.16795, §4)."""

from __future__ import annotations

import functools
import heapq

import numpy as np

from qmoe_jax.coding.codebook import Codebook

P_ZERO = 0.885
CODEWORDS = 1 << 16
MAX_PAIRS = 14


def pair_probabilities() -> list[float]:
    """Return the probability of each pair of digits, index = first digit + 3 * second, in float64."""
    digit = [P_ZERO, (1 - P_ZERO) / 2, (1 - P_ZERO) / 2]
    return [first * second for second in digit for first in digit]


@functools.cache
def upstream_codebook() -> Codebook:
    """Return the dictionary, entries in the order of their codes.

    Rounding decides both order and membership, so probabilities are multiplied one after the other in
    float64, as the original does: exact arithmetic gives another dictionary. Ties go to the smaller sequence.
    """
    pairs = pair_probabilities()
    frontier: list[tuple[float, bytes]] = [(-1.0, b"")]
    sequences: list[bytes] = []
    push, pop = heapq.heappush, heapq.heappop
    symbols = [(bytes([symbol]), probability) for symbol, probability in enumerate(pairs)]
    while len(sequences) < CODEWORDS:
        negative, sequence = pop(frontier)
        if sequence:
            sequences.append(sequence)
        if len(sequence) < MAX_PAIRS:
            for symbol, probability in symbols:
                push(frontier, (negative * probability, sequence + symbol))
    lengths = np.array([2 * len(sequence) for sequence in sequences], np.int32)
    padded = b"".join(sequence.ljust(MAX_PAIRS, b"\0") for sequence in sequences)
    coded = np.frombuffer(padded, np.uint8).reshape(CODEWORDS, MAX_PAIRS)
    digits = np.stack([coded % 3, coded // 3], axis=-1).reshape(CODEWORDS, 2 * MAX_PAIRS)
    return Codebook("upstream", lengths, digits, symbol_digits=2)
