"""`quantize_block`, one suite for every backend: each digit is judged in float64, given the digits before it.

So a target within float32 rounding of a border, which may fall on either side, fails nothing, and neither do
the columns behind it, which differ from there on.
"""

import functools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.quantize_block.arithmetic import round_half_to_even
from pallas_kernels.quantize_block.pallas import quantize_block
from qmoe_jax.quantization import Grid, rate_distortion_grid, ternary_grid, uniform_grid
from qmoe_jax.quantization.grids import UniformGrid
from qmoe_jax.quantization.rate_distortion import RateDistortionGrid
from tests.helpers.bounds import checked_kernels, ran, strays, traced
from tests.helpers.lowering import kernels, lowered_for_cuda

BACKENDS = {
    "reference": {"backend": "reference"},
    "pallas": {"backend": "pallas_interpret"},
}
RATE, BITS = 0.5, (0.1, 1.8, 2.2)
GRIDS = {
    "ternary": ternary_grid(),
    "uniform-2": uniform_grid(2),
    "uniform-3": uniform_grid(3),
    "uniform-4": uniform_grid(4),
    "rate-distortion": rate_distortion_grid(RATE, BITS),
}

every_backend = pytest.mark.parametrize("chosen", BACKENDS.values(), ids=BACKENDS)
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


class Block(NamedTuple):
    w: np.ndarray
    error_feedback: np.ndarray
    lower: np.ndarray
    curvature: np.ndarray
    levels: np.ndarray
    group_index: np.ndarray

    def rounded(self, grid: Grid, **chosen) -> pk.RoundedBlock:
        *arrays, levels, group_index = self
        return pk.quantize_block(*arrays, levels=levels, group_index=group_index, grid=grid, **chosen)


def block(grid: Grid, shape: tuple[int, ...], *, groups=1, seed=0) -> Block:
    """A random problem of `shape` [*expert, column, out]."""
    *experts, columns, out = shape
    rng = np.random.default_rng(seed)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    lower = np.tril(normal((*experts, columns, columns)) / np.float32(columns**0.5), -1) + np.eye(
        columns, dtype=np.float32
    )
    spread = rng.random((*experts, groups, out), np.float32) + 0.5
    if isinstance(grid, UniformGrid):
        largest = grid.num_digits - 1
        levels = np.stack([spread / largest * 4, np.round(spread * largest / 2)], -1)
    else:
        levels = np.stack([-spread, spread[..., ::-1]], -1)
    group_index = (np.arange(columns) * groups // columns).astype(np.int32)
    curvature = rng.random((*experts, columns), np.float32) + 0.5
    return Block(normal(shape), normal(shape), lower, curvature, levels.astype(np.float32), group_index)


def values_of(grid: Grid, levels: np.ndarray) -> np.ndarray:
    """The value of every digit, float64 [digit, column, out]."""
    first, second = levels.astype(np.float64)[..., 0], levels.astype(np.float64)[..., 1]
    if isinstance(grid, UniformGrid):
        return first * (np.arange(grid.num_digits)[:, None, None] - second)
    return np.stack([np.zeros_like(first), first, second])


ROUNDING = 1e-4  # of a cost in float32


def assert_rounded(problem: Block, grid: Grid, found: pk.RoundedBlock) -> np.ndarray:
    """Check for one expert that no other digit is better by more than float32 rounding; the rest follows.

    Returns:
        The rows that met no border: there only one digit was as good as the best, in every column.
    """
    w, error_feedback, lower, curvature = (array.astype(np.float64) for array in problem[:4])
    every = values_of(grid, problem.levels[problem.group_index])
    value = np.take_along_axis(every, np.asarray(found.digits, np.int64)[None], 0)[0]
    np.testing.assert_allclose(found.deviation, w - value, rtol=0, atol=2e-6)
    target = w + error_feedback + np.tril(lower, -1) @ (w - value)
    cost = curvature[:, None] * (target - every) ** 2
    if isinstance(grid, RateDistortionGrid):
        cost += RATE * np.array(BITS)[:, None, None]
    taken = np.take_along_axis(cost, np.asarray(found.digits, np.int64)[None], 0)[0]
    assert (taken - cost.min(0) <= ROUNDING).all()
    error = (curvature[:, None] * (target - value) ** 2).sum(0)
    np.testing.assert_allclose(found.error, error, rtol=1e-4, atol=1e-5)
    return (np.sort(cost, axis=0)[1] - cost.min(0) > 2 * ROUNDING).all(0)


@every_backend
@every_grid
def test_every_digit_is_the_best_given_those_before(chosen, grid):
    """34 columns in panels of 2; rows of two programs, the second not full."""
    problem = block(grid, (34, 131), groups=3)
    assert_rounded(problem, grid, problem.rounded(grid, **chosen))


@hypothesis.settings(deadline=None, max_examples=3, derandomize=True)
@hypothesis.given(
    columns=st.sampled_from([1, 6, 16, 34]),
    out=st.sampled_from([1, 33, 128, 200]),
    groups=st.integers(1, 3),
    name=st.sampled_from(list(GRIDS)),
)
def test_interpret_mode_is_the_reference(columns, out, groups, name):
    grid = GRIDS[name]
    problem = block(grid, (columns, out), groups=groups, seed=columns + out)
    found = problem.rounded(grid, **BACKENDS["pallas"])
    sure = assert_rounded(problem, grid, found)
    wanted = problem.rounded(grid, **BACKENDS["reference"])
    same = np.asarray(found.digits == wanted.digits).all(0)
    assert same[sure].all()
    assert sure.mean() > 0.95 or len(sure) < 100
    np.testing.assert_allclose(found.deviation[:, same], wanted.deviation[:, same], atol=1e-5)
    np.testing.assert_allclose(found.error[same], wanted.error[same], rtol=1e-4, atol=1e-5)


@every_backend
def test_experts_are_rounded_one_by_one_under_jit_and_vmap(chosen):
    grid = GRIDS["uniform-2"]
    problem = block(grid, (3, 6, 20), groups=2)
    stacked = problem.rounded(grid, **chosen)
    axes = Block(0, 0, 0, 0, 0, None)
    mapped = jax.jit(jax.vmap(lambda p: p.rounded(grid, **chosen), in_axes=(axes,)))(problem)
    for expert in range(3):
        alone = Block(*(array[expert] for array in problem[:5]), problem.group_index)
        for results in (stacked, mapped):
            assert_rounded(alone, grid, jax.tree.map(lambda x, e=expert: x[e], results))


@every_backend
@pytest.mark.parametrize("stray", [-7, 99])
def test_a_group_out_of_range_is_the_nearest(chosen, stray):
    problem = block(GRIDS["ternary"], (4, 9), groups=2)
    nearest = problem._replace(group_index=np.clip(problem.group_index + stray, 0, 1))
    strayed = problem._replace(group_index=problem.group_index + stray)
    for found, wanted in zip(*(p.rounded(ternary_grid(), **chosen) for p in (strayed, nearest)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@every_backend
@pytest.mark.parametrize("name", ["ternary", "uniform-2"])
def test_whatever_the_numbers_the_digits_exist(chosen, name):
    """Infinite and NaN weights reach the digits, but nothing beside their own rows."""
    grid = GRIDS[name]
    problem = block(grid, (6, 12))
    clean = problem.rounded(grid, **chosen)
    problem.w[2, 3], problem.w[0, 5], problem.error_feedback[1, 7] = np.nan, np.inf, -np.inf
    found = problem.rounded(grid, **chosen)
    others = np.delete(np.arange(12), [3, 5, 7])
    np.testing.assert_array_equal(found.digits[:, others], clean.digits[:, others])
    assert np.isnan(found.error[3])
    if chosen["backend"] == "reference":  # what a NaN becomes as an integer is the processor's choice
        assert found.digits.max() < grid.num_digits


def test_only_what_is_below_the_diagonal_is_read():
    problem = block(ternary_grid(), (12, 5))
    garbage = problem._replace(lower=np.tril(problem.lower, -1) + np.triu(np.full((12, 12), np.float32(99))))
    for found, wanted in zip(
        *(p.rounded(ternary_grid(), **BACKENDS["pallas"]) for p in (garbage, problem)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_rounding_is_half_to_even():
    ties = np.arange(-40, 40, 0.5, dtype=np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(99)), np.nextafter(ties, np.float32(-99))])
    np.testing.assert_array_equal(jax.jit(round_half_to_even)(x), np.round(x))
    np.testing.assert_array_equal(round_half_to_even(jnp.float32([-3e38, 3e38])), [-(2.0**20), 2.0**20])


@pytest.mark.parametrize("name", ["ternary", "uniform-4", "rate-distortion"])
def test_the_experts_of_a_layer_lower_to_one_triton_kernel(name):
    grid = GRIDS[name]
    problem = block(grid, (2, 128, 200), groups=3)
    axes = (0, 0, 0, 0, 0, None, None)
    program = lowered_for_cuda(jax.vmap(quantize_block, in_axes=axes), *problem, grid)
    assert kernels(program) == 1
    assert 'name = "quantize_block"' in program


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lower": np.zeros((4, 5), np.float32)}, r"needs lower of shape \(4, 4\), found \(4, 5\)"),
        (
            {"levels": np.zeros((1, 8, 2), np.float32)},
            r"needs levels of shape \(1, 9, 2\), found \(1, 8, 2\)",
        ),
        ({"group_index": np.zeros(3, np.int32)}, r"needs group_index of shape \(4,\), found \(3,\)"),
        ({"w": np.zeros((4, 9), jnp.bfloat16)}, "expected w in float32, found bfloat16"),
    ],
)
def test_operands_of_other_shapes_and_dtypes_are_refused(monkeypatch, change, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as outside the tests
    problem = block(ternary_grid(), (4, 9))._replace(**change)
    with pytest.raises(ValueError, match=message):
        problem.rounded(ternary_grid())


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="requires an NVIDIA GPU"):
        block(ternary_grid(), (4, 9)).rounded(ternary_grid(), backend="pallas")


@pytest.mark.parametrize("name", ["ternary", "uniform-4"])
def test_no_group_and_no_number_leads_the_kernel_out_of_an_array(name):
    grid = GRIDS[name]
    rng = np.random.default_rng(0)
    problem = block(grid, (2, 6, 37), groups=2)
    noise = [rng.integers(0, 2**32, array.shape, np.uint32).view(np.float32) for array in problem[:5]]
    groups = rng.integers(-(2**31), 2**31, 6).astype(np.int32)
    problem = type(problem)(*noise, groups)
    traced.clear()
    with checked_kernels():  # of a shape that no other test has traced
        digits, _, error = ran(jax.jit(lambda p: p.rounded(grid, backend="pallas_interpret")), problem)
    assert traced == {"load", "store"}
    assert strays == []
    assert digits.shape == (2, 6, 37)
    assert error.shape == (2, 37)
