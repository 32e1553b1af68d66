"""Rounding to nearest."""

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.quantization import round_to_nearest, ternary_grid, uniform_grid
from tests.helpers import golden

W = golden.vectors["A.W"]


@pytest.mark.parametrize("bits", ["1.5", "2"])
def test_upstreams_values_and_levels(bits):
    q = round_to_nearest(W, golden.grid_of(bits))
    scale, zero = golden.vectors[f"A.b{bits}.scale"], golden.vectors[f"A.b{bits}.zero"]
    np.testing.assert_array_equal(q.values, golden.vectors[f"A.b{bits}_rtn.Q"])
    np.testing.assert_array_equal(
        q.levels[:, :, 0], np.stack([zero, scale] if bits == "1.5" else [scale, zero], -1)
    )


@pytest.mark.parametrize("width, group_size", [(10, 5), (10, 4), (10, 1), (10, 99)])
def test_a_group_is_rounded_like_a_matrix_of_its_own(width, group_size):
    w = W[:2, :3, :width]
    q = round_to_nearest(w, uniform_grid(bits=3), group_size)
    for group, start in enumerate(range(0, width, group_size)):
        columns = slice(start, start + group_size)
        alone = round_to_nearest(w[:, :, columns], uniform_grid(bits=3))
        np.testing.assert_array_equal(q.values[:, :, columns], alone.values)
        np.testing.assert_array_equal(q.levels[:, :, group], alone.levels[:, :, 0])
        assert (q.group_index[:, columns] == group).all()
    assert q.levels.shape == (2, 3, group + 1, 2)


def test_error_and_fallback():
    q = round_to_nearest(W, ternary_grid())
    want = 0.5 * ((W - np.asarray(q.values, np.float64)) ** 2).sum((1, 2))
    np.testing.assert_allclose(q.error, want, rtol=1e-4)  # a float32 sum of 16,384 squares, in any order
    assert not q.fallback.any()


def test_bfloat16_weights_are_rounded_in_float32():
    w = W.astype(ml_dtypes.bfloat16)
    q = round_to_nearest(w, uniform_grid(bits=4))
    np.testing.assert_array_equal(
        q.values, round_to_nearest(w.astype(np.float32), uniform_grid(bits=4)).values
    )


def test_a_group_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="group_size must be None or >= 1, found 0"):
        round_to_nearest(W, ternary_grid(), 0)
