"""What `Grid` promises, held for every grid: one row each."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import Grid, rate_distortion_grid, round_to_nearest, ternary_grid, uniform_grid
from qmoe_jax.quantization.rate_distortion import DEFAULT_BITS_PER_DIGIT

RATE = 0.3

# name: grid, number of digits, whether it takes the nearest level whatever the curvature
GRIDS = {
    "ternary": (ternary_grid(), 3, True),
    "uniform-2": (uniform_grid(bits=2), 4, True),
    "uniform-3": (uniform_grid(bits=3), 8, True),
    "uniform-4": (uniform_grid(bits=4), 16, True),
    "rate-distortion": (rate_distortion_grid(RATE, level_scale=1.25), 3, False),
}

every_grid = pytest.mark.parametrize("grid, digits, nearest", GRIDS.values(), ids=GRIDS)
some = hypothesis.settings(deadline=None, max_examples=15, derandomize=True)
ONE = jnp.float32(1)

weights = arrays.arrays(
    np.float32, (3, 8), elements=st.floats(-4, 4, width=32, allow_subnormal=False), fill=st.just(0.0)
)


def levels_of(grid: Grid, w: np.ndarray) -> jax.Array:
    return grid.find_levels(jnp.asarray(w))[:, None]


@every_grid
def test_it_is_a_grid_and_a_pytree(grid, digits, nearest):
    assert isinstance(grid, Grid)
    leaves, structure = jax.tree.flatten(grid)
    assert jax.tree.unflatten(structure, leaves) == grid


@every_grid
@some
@hypothesis.given(w=weights)
def test_digits_name_values(grid, digits, nearest, w):
    levels = levels_of(grid, w)
    got = grid.quantize(jnp.asarray(w), levels, ONE)
    assert got.dtype == jnp.uint8
    assert got.max() < digits
    values = grid.dequantize(got, levels)
    assert values.dtype == jnp.float32
    assert np.isfinite(values).all()


@every_grid
@some
@hypothesis.given(w=weights)
def test_zero_is_a_value(grid, digits, nearest, w):
    levels = levels_of(grid, w)
    zero = grid.quantize(jnp.zeros((3, 1)), levels, ONE)
    np.testing.assert_array_equal(grid.dequantize(zero, levels), np.zeros((3, 1)))


@every_grid
@some
@hypothesis.given(w=weights, padding=st.integers(1, 4))
def test_zeros_change_no_level(grid, digits, nearest, w, padding):
    np.testing.assert_array_equal(levels_of(grid, np.pad(w, [(0, 0), (0, padding)])), levels_of(grid, w))


@every_grid
@some
@hypothesis.given(w=weights)
def test_a_matrix_is_its_columns(grid, digits, nearest, w):
    """Solvers quantize a column at a time, rounding to nearest everything at once."""
    levels = levels_of(grid, w)
    columns = [grid.quantize(jnp.asarray(column), levels[:, 0], ONE) for column in w.T]
    np.testing.assert_array_equal(grid.quantize(jnp.asarray(w), levels, ONE), np.stack(columns, -1))


@every_grid
@some
@hypothesis.given(w=weights, log_curvature=st.integers(-3, 3))
def test_nearest_means_nearest(grid, digits, nearest, w, log_curvature):
    levels = levels_of(grid, w)
    curvature = jnp.float32(10.0**log_curvature)
    values = grid.dequantize(grid.quantize(jnp.asarray(w), levels, curvature), levels)
    every = grid.dequantize(jnp.tile(jnp.arange(digits, dtype=jnp.uint8), (3, 1)), levels)
    # Shape: [row, column, digit]
    best = np.abs(w[:, :, None] - np.asarray(every)[:, None]).min(-1)
    if nearest:
        np.testing.assert_allclose(np.abs(w - values), best, rtol=1e-5, atol=1e-5)
    else:  # what it gives up for the rate: at most the rate times the bits of the dearest digit
        assert (curvature * ((w - values) ** 2 - best**2) <= RATE * max(DEFAULT_BITS_PER_DIGIT) + 1e-4).all()


@every_grid
@some
@hypothesis.given(w=weights)
def test_rounding_again_changes_nothing(grid, digits, nearest, w):
    levels = levels_of(grid, w)
    once = grid.dequantize(grid.quantize(jnp.asarray(w), levels, jnp.float32(1e6)), levels)
    again = grid.dequantize(grid.quantize(once, levels, jnp.float32(1e6)), levels)
    np.testing.assert_array_equal(again, once)


@every_grid
def test_nearest_rounding_takes_it(grid, digits, nearest):
    w = np.random.default_rng(0).standard_normal((2, 3, 5), np.float32)
    q = round_to_nearest(w, grid)
    assert q.digits.max() < digits
    np.testing.assert_array_equal(q.values, grid.dequantize(q.digits, q.levels))
