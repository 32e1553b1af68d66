"""Tunstall codebooks over ternary digits: the leaves of the most probable complete tree (Tunstall, 1967)."""

from __future__ import annotations

import functools
import heapq

import numpy as np

from qmoe_jax.coding.codebook import Codebook


@functools.lru_cache(maxsize=64)
def tunstall_codebook(p_zero: float = 0.885, code_bits: int = 8, max_length: int = 64) -> Codebook:
    """Return the codebook for independent digits with P(0) = `p_zero`, digits 1 and 2 equally likely.

    The most probable leaf is expanded into its three children until 2**code_bits would be exceeded; a leaf of
    `max_length` digits is not expanded. The codes are in the order of falling probability, ties by digits.

    Args:
        p_zero: probability of a zero, between 0 and 1.
        code_bits: bits of a codeword, 2 to 16.
        max_length: most digits of a codeword.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < p_zero < 1:
        raise ValueError(f"p_zero: expected a probability between 0 and 1, found {p_zero}")
    if not 2 <= code_bits <= 16:
        raise ValueError(f"code_bits: expected 2 to 16, found {code_bits}")
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, found {max_length}")
    p_other = (1 - p_zero) / 2
    probabilities = [(b"\0", p_zero), (b"\1", p_other), (b"\2", p_other)]
    growing: list[tuple[float, bytes]] = [(-1.0, b"")]
    full: list[tuple[float, bytes]] = []
    while growing and len(growing) + len(full) + 2 <= 1 << code_bits:
        negative, word = heapq.heappop(growing)
        for digit, probability in probabilities:
            leaf = (negative * probability, word + digit)
            if len(leaf[1]) < max_length:
                heapq.heappush(growing, leaf)
            else:
                full.append(leaf)
    words = [word for _, word in sorted(growing + full)]
    lengths = np.array([len(word) for word in words], np.int32)
    longest = int(lengths.max())
    digits = np.frombuffer(b"".join(word.ljust(longest, b"\0") for word in words), np.uint8).reshape(
        -1, longest
    )
    return Codebook(f"tunstall-{code_bits}-{p_zero:g}", lengths, digits)
