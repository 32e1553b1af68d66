"""Checks of argmaxes that hold on any CPU: a choice is compared only where rounding cannot change it.

Logits of one model differ between CPUs by up to 7e-5 of the largest (the tiny models amplify rounding). A
choice is decided where the best logit leads by more than `TOLERANCE` of the largest; elsewhere either may be
taken, and what follows from it differs.
"""

from __future__ import annotations

import jax
import numpy as np

TOLERANCE = 2e-4


def decided(logits) -> np.ndarray:
    """Return whether the best of the logits `[..., choice]` leads by more than rounding could make up."""
    logits = np.asarray(logits, np.float64)
    first, second = np.moveaxis(np.sort(logits, axis=-1)[..., -2:], -1, 0)[::-1]
    return first - second > TOLERANCE * np.abs(logits).max()


def assert_same_choices(logits, expected, where) -> bool:
    """Check that the best logits are the expected ones `where` they are decided, and that nearly all are.

    Returns:
        Whether the undecided ones are equal too, so that what follows can be compared.
    """
    same, sure = (np.argmax(logits, -1) == expected)[where], decided(logits)[where]
    assert same[sure].all(), f"{np.sum(~same & sure)} choices differ beyond rounding"
    assert sure.mean() > 0.9
    return bool(same.all())


def assert_same_generation(model, params, encoder, found, expected) -> None:
    """Check greedily generated tokens `[row, step]`, each row up to its first undecided step."""
    found, expected = np.asarray(found), np.asarray(expected)
    decoder = np.pad(expected[:, :-1], ((0, 0), (1, 0)))  # the start token is 0
    sure = decided(jax.jit(model.apply)({"params": params}, encoder, decoder))
    different = found != expected
    rows = np.flatnonzero(different.any(1))
    assert not sure[rows, different[rows].argmax(1)].any(), "a token differs beyond rounding"
    assert sure.mean() > 0.9
