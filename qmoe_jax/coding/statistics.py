"""How often digits occur, and what that allows."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, UInt8


def digit_frequencies(digits: UInt8[np.ndarray, "..."]) -> Float64[np.ndarray, "3"]:
    """The share of the digits 0, 1 and 2.

    Raises:
      ValueError: there are no digits.
    """
    if digits.size == 0:
        raise ValueError("expected at least one digit, found none")
    return np.bincount(digits.reshape(-1), minlength=3) / digits.size


def entropy_bits(frequencies: Float64[np.ndarray, "digit"]) -> float:
    """Bits a digit that a code needs at least where digits are independent: -sum p log2 p."""
    p = frequencies[frequencies > 0]
    return float(-(p * np.log2(p)).sum())


def fitted_p_zero(frequencies: Float64[np.ndarray, "3"], *, margin: float = 1e-3) -> float:
    """The share of zeros, kept `margin` from 0 and 1: what to make `tunstall_codebook` for."""
    return float(np.clip(frequencies[0], margin, 1 - margin))
