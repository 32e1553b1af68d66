"""The contract of `Grid`, for every grid: one row each."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize_block import BlockGrid
from qmoe_jax.quantization import Grid, rate_distortion_grid, round_to_nearest, ternary_grid, uniform_grid
from qmoe_jax.quantization.rate_distortion import DEFAULT_BITS_PER_DIGIT

RATE = 0.3

# name: grid, whether it takes the nearest level whatever the curvature
GRIDS = {
    "ternary": (ternary_grid(), True),
    "uniform-2": (uniform_grid(bits=2), True),
    "uniform-3": (uniform_grid(bits=3), True),
    "uniform-4": (uniform_grid(bits=4), True),
    "rate-distortion": (rate_distortion_grid(RATE, level_scale=1.25), False),
}

every_grid = pytest.mark.parametrize("grid, nearest", GRIDS.values(), ids=GRIDS)
some = hypothesis.settings(deadline=None, max_examples=15, derandomize=True)
ONE = jnp.float32(1)

weights = arrays.arrays(
    np.float32, (3, 8), elements=st.floats(-4, 4, width=32, allow_subnormal=False), fill=st.just(0.0)
)


def levels_of(grid: Grid, w: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The two numbers of each row, each [row, 1]."""
    first, second = jnp.unstack(grid.find_levels(jnp.asarray(w)), axis=-1)
    return first[:, None], second[:, None]


@every_grid
def test_a_grid_is_a_pytree_of_scalars_that_the_kernel_takes(grid, nearest):
    assert isinstance(grid, Grid) and isinstance(grid, BlockGrid)
    assert all(jnp.shape(leaf) == () for leaf in jax.tree.leaves(grid))
    leaves, structure = jax.tree.flatten(grid)
    assert jax.tree.unflatten(structure, leaves) == grid


@every_grid
@some
@hypothesis.given(w=weights)
def test_every_digit_is_below_the_number_of_digits_and_has_a_finite_value(grid, nearest, w):
    levels = levels_of(grid, w)
    got = grid.digit(jnp.asarray(w), levels, ONE)
    assert got.dtype == jnp.uint8
    assert got.max() < grid.num_digits
    values = grid.value(got, levels)
    assert values.dtype == jnp.float32
    assert np.isfinite(values).all()


@every_grid
@some
@hypothesis.given(w=weights)
def test_zero_is_a_value_of_every_row(grid, nearest, w):
    levels = levels_of(grid, w)
    zero = grid.digit(jnp.zeros((3, 1)), levels, ONE)
    np.testing.assert_array_equal(grid.value(zero, levels), np.zeros((3, 1)))


@every_grid
@some
@hypothesis.given(w=weights, padding=st.integers(1, 4))
def test_zeros_added_to_a_row_change_no_level(grid, nearest, w, padding):
    np.testing.assert_array_equal(levels_of(grid, np.pad(w, [(0, 0), (0, padding)])), levels_of(grid, w))


@every_grid
@some
@hypothesis.given(w=weights)
def test_digits_of_a_matrix_are_those_of_its_columns(grid, nearest, w):
    """Solvers quantize a column at a time, rounding to nearest everything at once."""
    levels = levels_of(grid, w)
    columns = [grid.digit(jnp.asarray(column), (levels[0][:, 0], levels[1][:, 0]), ONE) for column in w.T]
    np.testing.assert_array_equal(grid.digit(jnp.asarray(w), levels, ONE), np.stack(columns, -1))


@every_grid
@some
@hypothesis.given(w=weights, log_curvature=st.integers(-3, 3))
def test_the_nearest_level_is_taken_or_a_cheaper_one_within_the_rate(grid, nearest, w, log_curvature):
    levels = levels_of(grid, w)
    curvature = jnp.float32(10.0**log_curvature)
    values = grid.value(grid.digit(jnp.asarray(w), levels, curvature), levels)
    every = grid.value(jnp.tile(jnp.arange(grid.num_digits, dtype=jnp.uint8), (3, 1)), levels)
    # Shape: [row, column, digit]
    best = np.abs(w[:, :, None] - np.asarray(every)[:, None]).min(-1)
    if nearest:
        np.testing.assert_allclose(np.abs(w - values), best, rtol=1e-5, atol=1e-5)
    else:  # what it gives up for the rate: at most the rate times the bits of the dearest digit
        assert (curvature * ((w - values) ** 2 - best**2) <= RATE * max(DEFAULT_BITS_PER_DIGIT) + 1e-4).all()


@every_grid
@some
@hypothesis.given(w=weights)
def test_rounding_values_again_changes_nothing(grid, nearest, w):
    levels = levels_of(grid, w)
    once = grid.value(grid.digit(jnp.asarray(w), levels, jnp.float32(1e6)), levels)
    again = grid.value(grid.digit(once, levels, jnp.float32(1e6)), levels)
    np.testing.assert_array_equal(again, once)


@every_grid
def test_round_to_nearest_takes_every_grid(grid, nearest):
    w = np.random.default_rng(0).standard_normal((2, 3, 5), np.float32)
    q = round_to_nearest(w, grid)
    assert q.digits.max() < grid.num_digits
    np.testing.assert_array_equal(q.values, grid.value(q.digits, jnp.unstack(q.levels, axis=-1)))


@every_grid
@some
@hypothesis.given(w=weights)
def test_numpy_digits_give_the_same_values_without_jax(grid, nearest, w):
    levels = levels_of(grid, w)
    digits = grid.digit(jnp.asarray(w), levels, ONE)
    found = grid.value(np.asarray(digits), (np.asarray(levels[0]), np.asarray(levels[1])))
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_array_equal(found, grid.value(digits, levels))
