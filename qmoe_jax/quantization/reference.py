"""Textbook GPTQ in NumPy, one expert and one column at a time.

Cholesky, inverse, Cholesky; every column updates all that follow it in its block, every block all blocks that
follow. Slow and plain, it shares nothing with `gptq.py`, which tests and benchmarks compare with it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8


def gptq_reference(
    w: Float[np.ndarray, "out in"],
    hessian: Float[np.ndarray, "in in"],
    bits: int | None,
    *,
    damping: float = 0.1,
    block_size: int = 128,
    group_size: int | None = None,
    activation_order: bool = False,
) -> tuple[Float[np.ndarray, "out in"], UInt8[np.ndarray, "out in"]]:
    """Return values and digits of one expert; `bits` None is ternary. The arithmetic is in the type of `w`.

    Raises:
        numpy.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    width = w.shape[1]
    order = np.argsort(-np.diagonal(hessian), kind="stable") if activation_order else np.arange(width)
    w = w[:, order].copy()
    upper = _upper_factor(hessian[np.ix_(order, order)].astype(w.dtype), damping)
    values, digits = np.zeros_like(w), np.zeros(w.shape, np.uint8)
    levels = _levels(w, bits)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        block, errors = w[:, start:end].copy(), np.zeros_like(w[:, start:end])
        for i in range(start, end):
            if group_size is not None and i % group_size == 0:
                levels = _levels(w[:, i : i + group_size], bits)
            column = block[:, i - start]
            digits[:, i], values[:, i] = _round(column, levels, bits)
            errors[:, i - start] = (column - values[:, i]) / upper[i, i]
            block -= np.outer(errors[:, i - start], upper[i, start:end])
        w[:, end:] -= errors @ upper[start:end, end:]
    inverse = np.argsort(order)
    return values[:, inverse], digits[:, inverse]


def _upper_factor(hessian: Float[np.ndarray, "in in"], damping: float) -> Float[np.ndarray, "in in"]:
    """Return U with UᵀU the inverse of the damped Hessian."""
    damped = hessian + max(damping * np.diagonal(hessian).mean(), 1e-6) * np.eye(
        len(hessian), dtype=hessian.dtype
    )
    half_inverse = np.linalg.inv(np.linalg.cholesky(damped))
    return np.linalg.cholesky(half_inverse.T @ half_inverse).T


def _levels(w: np.ndarray, bits: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return (minimum, maximum) of each row, or (step, zero point)."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    zeros = (low == 0) & (high == 0)
    low[zeros], high[zeros] = -1, 1
    if bits is None:
        return low, high
    step = (high - low) / w.dtype.type(2**bits - 1)
    return step, np.round(-low / step)


def _round(
    column: np.ndarray, levels: tuple[np.ndarray, np.ndarray], bits: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return digits and values of one column."""
    if bits is None:
        low, high = levels
        digits = np.where((column > high / 2) & (high > 0), 2, np.where((column < low / 2) & (low < 0), 1, 0))
        return digits, np.choose(digits, [np.zeros_like(low), low, high])
    step, zero_point = levels
    digits = np.clip(np.round(column / step) + zero_point, 0, 2**bits - 1)
    return digits, step * (digits - zero_point)
