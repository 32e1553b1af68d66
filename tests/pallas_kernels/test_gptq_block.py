"""`quantize_block`, one suite for every backend: each digit is judged in float64, given the digits before it.

So a target within float32 rounding of a border, which may fall on either side, fails nothing, and neither do the
columns behind it, which differ from there on.
"""

import functools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lowering import kernels, lowered_for_cuda

import pallas_kernels as pk
from pallas_kernels.gptq_block.pallas import gptq_block
from pallas_kernels.gptq_block.rounding import round_half_to_even

BACKENDS = {
    "reference": {"backend": "reference"},
    "pallas": {"backend": "pallas", "interpret": True},
}
COSTS = (0.05, 0.9, 1.1)
# name: rounding, number of digits
ROUNDINGS = {
    "ternary": (pk.TernaryRounding(), 3),
    "uniform-2": (pk.UniformRounding(3), 4),
    "uniform-3": (pk.UniformRounding(7), 8),
    "uniform-4": (pk.UniformRounding(15), 16),
    "cost": (pk.CostRounding(*map(jnp.float32, COSTS)), 3),
}

every_backend = pytest.mark.parametrize("chosen", BACKENDS.values(), ids=BACKENDS)
every_rounding = pytest.mark.parametrize("rounding, digits", ROUNDINGS.values(), ids=ROUNDINGS)


class Block(NamedTuple):
    w: np.ndarray
    pull: np.ndarray
    lower: np.ndarray
    curvature: np.ndarray
    levels: np.ndarray
    group: np.ndarray

    def rounded(self, rounding, **chosen) -> pk.RoundedBlock:
        *arrays, levels, group = self
        return pk.quantize_block(*arrays, levels=levels, group=group, rounding=rounding, **chosen)


def block(rounding, shape: tuple[int, ...], *, groups=1, seed=0) -> Block:
    """A random problem of `shape` [*expert, column, out]."""
    *experts, columns, out = shape
    rng = np.random.default_rng(seed)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    lower = np.tril(normal((*experts, columns, columns)) / np.float32(columns**0.5), -1) + np.eye(
        columns, dtype=np.float32
    )
    spread = rng.random((*experts, groups, out), np.float32) + 0.5
    if isinstance(rounding, pk.UniformRounding):
        levels = np.stack([spread / rounding.max_digit * 4, np.round(spread * rounding.max_digit / 2)], -1)
    else:
        levels = np.stack([-spread, spread[..., ::-1]], -1)
    group = (np.arange(columns) * groups // columns).astype(np.int32)
    curvature = rng.random((*experts, columns), np.float32) + 0.5
    return Block(normal(shape), normal(shape), lower, curvature, levels.astype(np.float32), group)


def values_of(rounding, digits: int, levels: np.ndarray) -> np.ndarray:
    """What every digit stands for, float64 [digit, column, out]."""
    first, second = levels.astype(np.float64)[..., 0], levels.astype(np.float64)[..., 1]
    if isinstance(rounding, pk.UniformRounding):
        return first * (np.arange(digits)[:, None, None] - second)
    return np.stack([np.zeros_like(first), first, second])


ROUNDING = 1e-4  # of a cost in float32


def assert_rounded(problem: Block, rounding, digits: int, found: pk.RoundedBlock) -> np.ndarray:
    """One expert: no other digit would have been better by more than float32 rounding; the rest follows from it.

    Returns:
        The rows that met no border: there only one digit was as good as the best, in every column.
    """
    w, pull, lower, curvature = (array.astype(np.float64) for array in problem[:4])
    every = values_of(rounding, digits, problem.levels[problem.group])
    value = np.take_along_axis(every, np.asarray(found.digits, np.int64)[None], 0)[0]
    np.testing.assert_allclose(found.deviation, w - value, rtol=0, atol=2e-6)
    target = w + pull + np.tril(lower, -1) @ (w - value)
    cost = curvature[:, None] * (target - every) ** 2
    if isinstance(rounding, pk.CostRounding):
        cost += np.array(COSTS)[:, None, None]
    taken = np.take_along_axis(cost, np.asarray(found.digits, np.int64)[None], 0)[0]
    assert (taken - cost.min(0) <= ROUNDING).all()
    error = (curvature[:, None] * (target - value) ** 2).sum(0)
    np.testing.assert_allclose(found.error, error, rtol=1e-4, atol=1e-5)
    return (np.sort(cost, axis=0)[1] - cost.min(0) > 2 * ROUNDING).all(0)


@every_backend
@every_rounding
def test_every_digit_is_the_best_given_those_before(chosen, rounding, digits):
    """34 columns in panels of 2; rows of two programs, the second not full."""
    problem = block(rounding, (34, 131), groups=3)
    assert_rounded(problem, rounding, digits, problem.rounded(rounding, **chosen))


@hypothesis.settings(deadline=None, max_examples=3, derandomize=True)
@hypothesis.given(
    columns=st.sampled_from([1, 6, 16, 34]),
    out=st.sampled_from([1, 33, 128, 200]),
    groups=st.integers(1, 3),
    name=st.sampled_from(list(ROUNDINGS)),
)
def test_interpret_mode_is_the_reference(columns, out, groups, name):
    rounding, digits = ROUNDINGS[name]
    problem = block(rounding, (columns, out), groups=groups, seed=columns + out)
    found = problem.rounded(rounding, **BACKENDS["pallas"])
    sure = assert_rounded(problem, rounding, digits, found)
    wanted = problem.rounded(rounding, **BACKENDS["reference"])
    same = np.asarray(found.digits == wanted.digits).all(0)
    assert same[sure].all()
    assert sure.mean() > 0.95 or len(sure) < 100
    np.testing.assert_allclose(found.deviation[:, same], wanted.deviation[:, same], atol=1e-5)
    np.testing.assert_allclose(found.error[same], wanted.error[same], rtol=1e-4, atol=1e-5)


@every_backend
def test_experts_are_rounded_one_by_one_under_jit_and_vmap(chosen):
    rounding, digits = ROUNDINGS["uniform-2"]
    problem = block(rounding, (3, 6, 20), groups=2)
    stacked = problem.rounded(rounding, **chosen)
    axes = Block(0, 0, 0, 0, 0, None)
    mapped = jax.jit(jax.vmap(lambda p: p.rounded(rounding, **chosen), in_axes=(axes,)))(problem)
    for expert in range(3):
        alone = Block(*(array[expert] for array in problem[:5]), problem.group)
        for results in (stacked, mapped):
            assert_rounded(alone, rounding, digits, jax.tree.map(lambda x, e=expert: x[e], results))


@every_backend
@pytest.mark.parametrize("stray", [-7, 99])
def test_a_group_out_of_range_is_the_nearest(chosen, stray):
    problem = block(ROUNDINGS["ternary"][0], (4, 9), groups=2)
    nearest = problem._replace(group=np.clip(problem.group + stray, 0, 1))
    strayed = problem._replace(group=problem.group + stray)
    for found, wanted in zip(
        *(p.rounded(pk.TernaryRounding(), **chosen) for p in (strayed, nearest)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@every_backend
@pytest.mark.parametrize("name", ["ternary", "uniform-2"])
def test_whatever_the_numbers_the_digits_exist(chosen, name):
    """Infinite and not-a-number weights reach the digits, but nothing beside their own rows."""
    rounding, digits = ROUNDINGS[name]
    problem = block(rounding, (6, 12))
    clean = problem.rounded(rounding, **chosen)
    problem.w[2, 3], problem.w[0, 5], problem.pull[1, 7] = np.nan, np.inf, -np.inf
    found = problem.rounded(rounding, **chosen)
    others = np.delete(np.arange(12), [3, 5, 7])
    np.testing.assert_array_equal(found.digits[:, others], clean.digits[:, others])
    assert np.isnan(found.error[3])
    if chosen["backend"] == "reference":  # what a NaN becomes as an integer is the processor's choice
        assert found.digits.max() < digits


def test_only_what_is_below_the_diagonal_is_read():
    problem = block(pk.TernaryRounding(), (12, 5))
    garbage = problem._replace(lower=np.tril(problem.lower, -1) + np.triu(np.full((12, 12), np.float32(99))))
    for found, wanted in zip(
        *(p.rounded(pk.TernaryRounding(), **BACKENDS["pallas"]) for p in (garbage, problem)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_rounding_is_half_to_even():
    ties = np.arange(-40, 40, 0.5, dtype=np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(99)), np.nextafter(ties, np.float32(-99))])
    np.testing.assert_array_equal(jax.jit(round_half_to_even)(x), np.round(x))
    np.testing.assert_array_equal(round_half_to_even(jnp.float32([-3e38, 3e38])), [-(2.0**20), 2.0**20])


@pytest.mark.parametrize("name", ["ternary", "uniform-4", "cost"])
def test_the_experts_of_a_layer_lower_to_one_triton_kernel(name):
    rounding, _ = ROUNDINGS[name]
    problem = block(rounding, (2, 128, 200), groups=3)
    axes = (0, 0, 0, 0, 0, None, None)
    program = lowered_for_cuda(jax.vmap(gptq_block, in_axes=axes), *problem, rounding)
    assert kernels(program) == 1
    assert 'name = "gptq_block"' in program


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lower": np.zeros((4, 5), np.float32)}, r"needs lower of shape \(4, 4\), found \(4, 5\)"),
        (
            {"levels": np.zeros((1, 8, 2), np.float32)},
            r"needs levels of shape \(1, 9, 2\), found \(1, 8, 2\)",
        ),
        ({"group": np.zeros(3, np.int32)}, r"a group for each of 4 columns, found \(3,\)"),
        ({"w": np.zeros((4, 9), jnp.bfloat16)}, "expected w in float32, found bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, change, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as outside the tests
    problem = block(pk.TernaryRounding(), (4, 9))._replace(**change)
    with pytest.raises(ValueError, match=message):
        problem.rounded(pk.TernaryRounding())


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="for NVIDIA GPUs"):
        block(pk.TernaryRounding(), (4, 9)).rounded(pk.TernaryRounding(), backend="pallas")
