"""Strict numerics: no implicit promotion of dtypes or ranks in the kernels."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_numerics():
    """Refuse operations on mixed dtypes, or on arrays of different rank."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
