"""The entropy of digits."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64


def entropy_bits(frequencies: Float64[np.ndarray, "digit"]) -> float:
    """Return -sum p log2 p: the least bits per digit of any code, where digits are independent."""
    p = frequencies[frequencies > 0]
    return float(-(p * np.log2(p)).sum())
