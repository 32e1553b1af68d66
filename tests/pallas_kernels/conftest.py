"""Strict numerics: no implicit promotion of dtypes in the kernels.

Promotion of ranks stays allowed here: the tiles of kernels broadcast [row, 1] with [lane], and weights with
scalars of a program.
"""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_numerics():
    """Refuse operations on mixed dtypes."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
