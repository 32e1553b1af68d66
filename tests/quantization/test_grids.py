"""The numerics of the grids, against upstream's quantizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import ternary_grid, uniform_grid
from tests.helpers import golden

VECTORS = np.load(golden.DATA / "quantizer_vectors.npz")
ONE = jnp.float32(1)


@pytest.mark.parametrize("compile", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("bits", ["1.5", "2", "3", "4"])
def test_levels_and_values_are_upstreams_bit_for_bit(bits, compile):
    grid = golden.grid_of(bits)
    w = jnp.asarray(VECTORS["w"])
    scale, zero = VECTORS[f"b{bits}_sym0.scale"][:, 0], VECTORS[f"b{bits}_sym0.zero"][:, 0]
    levels = compile(grid.find_levels)(w)
    np.testing.assert_array_equal(levels, np.stack([zero, scale] if bits == "1.5" else [scale, zero], -1))

    def round_trip(w, levels):
        pair = jnp.unstack(levels[:, None], axis=-1)
        return grid.value(grid.digit(w, pair, ONE), pair)

    np.testing.assert_array_equal(compile(round_trip)(w, levels), VECTORS[f"b{bits}_sym0.q"])


def test_ternary_thresholds_are_strict():
    levels = jnp.array([-2.0]), jnp.array([4.0])
    w = jnp.array([2.0, 2.0001, -1.0, -1.0001, 0.0])
    np.testing.assert_array_equal(ternary_grid().digit(w, levels, ONE), [0, 2, 0, 1, 0])


def test_ternary_never_uses_a_level_of_zero():
    """Error feedback may move a weight of a row without positive weights above zero."""
    low, high = jnp.array([-1.0, 0.0]), jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(ternary_grid().digit(jnp.array([0.1, -0.1]), (low, high), ONE), [0, 0])


def test_uniform_rounds_half_to_even_and_clips():
    levels = jnp.array([1.0]), jnp.array([1.0])
    w = jnp.array([-9.0, -0.5, 0.5, 1.5, 9.0])
    np.testing.assert_array_equal(uniform_grid(bits=2).digit(w, levels, ONE), [0, 1, 1, 3, 3])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_compiled_division_is_correctly_rounded(bits):
    """XLA would multiply by reciprocals, which moves about one weight in a thousand that lies at a border."""
    rng = np.random.default_rng(0)
    step = (rng.random((256, 1), np.float32) + np.float32(0.1)).repeat(64, 1)
    w = step * (rng.integers(0, 3, step.shape) + 0.5).astype(np.float32)
    digits = jax.jit(uniform_grid(bits=bits).digit)(w, (step[:, :1], jnp.zeros((256, 1))), ONE)
    np.testing.assert_array_equal(digits, np.clip(np.round(w / step), 0, 2**bits - 1))


def test_a_uniform_grid_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"bits must be 2, 3 or 4, found 8"):
        uniform_grid(bits=8)
