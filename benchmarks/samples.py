"""Random ternary matrices and codewords at the sparsity that the paper reports, for benchmarks and tests."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from qmoe_jax.coding import Codebook

P_ZERO = 0.885  # the sparsity of the compressed switch-c-2048


class TernaryMatrix(NamedTuple):
    """A ternary matrix.

    Attributes:
        digits: uint8 [out, in]: 0 for zero, 1 for the row's negative level, 2 for its positive one.
        levels: bfloat16 [out, 2].
        weights: the matrix itself, float64 [out, in].
    """

    digits: np.ndarray
    levels: np.ndarray
    weights: np.ndarray


def random_digits(
    shape: tuple[int, ...], p_zero: float | np.ndarray = P_ZERO, seed: int | np.random.Generator = 0
) -> np.ndarray:
    """Draw independent ternary digits; the two nonzero ones are equally likely.

    Args:
        shape: shape of the result.
        p_zero: probability of a zero; broadcasts against `shape`.
        seed: a seed, or the generator to draw from.

    Returns:
        uint8 array of 0, 1 and 2.
    """
    rng = np.random.default_rng(seed)
    return ((rng.random(shape) >= p_zero) * rng.integers(1, 3, shape)).astype(np.uint8)


def random_ternary(rows: int, width: int) -> TernaryMatrix:
    """Draw a matrix with levels between 0.1 and 1.1 in magnitude; always the same one for a shape."""
    rng = np.random.default_rng(0)
    digits = random_digits((rows, width), seed=rng)
    levels = np.stack([-rng.random(rows) - 0.1, rng.random(rows) + 0.1], -1).astype(ml_dtypes.bfloat16)
    return TernaryMatrix(digits, levels, dequantize(digits, levels))


def dequantize(digits: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the float64 weights [..., out, in] of digits [..., out, in] with levels [..., out, 2]."""
    table = np.concatenate([np.zeros((*levels.shape[:-1], 1)), levels.astype(np.float64)], -1)
    return np.take_along_axis(table, digits.astype(np.int64), -1)


def codeword_probabilities(codebook: Codebook, p_zero: float = P_ZERO) -> np.ndarray:
    """Return each codeword's probability in the code of independent digits; the sum is 1 up to rounding."""
    nonzeros = (codebook.digits != 0).sum(1)
    return p_zero ** (codebook.lengths - nonzeros) * ((1 - p_zero) / 2) ** nonzeros
