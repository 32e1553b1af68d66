"""The check of digits itself: a wrong digit is caught, a border is not; and other CPUs' rounding passes."""

import functools

import numpy as np
import pytest

from qmoe_jax.quantization import factorize, gptq
from tests.helpers import golden
from tests.helpers.golden_digits import MOST_AT_A_BORDER, Problem, Replay, determined_places

RUNS = {run.key: run for run in golden.RUNS}
ILL_CONDITIONED = [RUNS["A.b1.5_pd0.01_gs-1_ao0"], RUNS["A.b2_pd0.01_gs-1_ao1"]]
each_run = pytest.mark.parametrize("run", ILL_CONDITIONED, ids=lambda run: run.key)


@functools.cache
def replayed(run: golden.Run, seed: int | None = None) -> list[Replay]:
    """Experts 0, 2 and 3, quantized with a Hessian as another CPU rounds it and judged by the true one."""
    experts = np.array([0, 2, 3])
    w, hessian = golden.vectors[f"{run.case}.W"][experts], golden.hessian(run.case)[experts]
    rounded = hessian
    if seed is not None:
        noise = np.tril(np.random.default_rng(seed).uniform(-1, 1, hessian.shape))
        noise += np.tril(noise, -1).swapaxes(1, 2)
        rounded = (hessian * (1 + noise * 2.0**-23)).astype(np.float32)
    q = gptq(
        w,
        rounded,
        golden.grid_of(run.bits),
        damping=run.damping,
        group_size=run.group_size,
        activation_order=run.activation_order,
    )
    order = factorize(rounded, run.damping, activation_order=True).order
    return [
        Problem.of(
            w[i],
            hessian[i],
            None if run.bits == "1.5" else int(run.bits),
            damping=run.damping,
            order=order[i] if run.activation_order else None,
            group_size=run.group_size,
        ).replay(q.digits[i], q.levels[i])
        for i in range(3)
    ]


def least_well_conditioned(run: golden.Run) -> Replay:
    return replayed(run)[1]


def planted(expert: Replay, row: int, place: int, *, followed: bool) -> Replay:
    """The digits with the nearest other one in one place; those after it follow from it, or do not."""
    problem, levels = expert.problem, expert.column_levels
    digits = expert.digits.copy()
    every = np.arange(3 if problem.bits is None else 2**problem.bits)
    target = np.full(len(every), expert.target[row, place])
    excess = problem.excess(target, every, levels[row, place])
    excess[digits[row, place]] = np.inf
    digits[row, place] = np.argmin(excess)
    for later in range(place + 1, digits.shape[1]) if followed else ():
        deviation = problem.w[row, :later] - problem.values(digits[row, :later], levels[row, :later])
        target = problem.w[row, later] + deviation @ problem.lower[later, :later]
        digits[row, later] = problem.nearest(np.array([target]), levels[row, later])[0]
    return Replay(problem, digits, expert.levels)


def in_matrix_order(expert: Replay) -> np.ndarray:
    digits = np.empty_like(expert.digits)
    digits[:, expert.problem.order] = expert.digits
    return digits


def unstandardized(expert: Replay) -> np.ndarray:
    """Distance of targets from their borders, in tolerances; the last columns, which few follow, left out."""
    return np.abs(expert.excess / expert.tolerance)[:, :128]


@each_run
@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("distance", [3.0, 30.0, 1000.0])
def test_a_wrong_digit_is_caught_wherever_its_target_lies(run, followed, distance):
    """From three tolerances off the border on: there as here, and in the comparison with upstream."""
    expert = least_well_conditioned(run)
    off = unstandardized(expert)
    row, place = np.unravel_index(np.argmin(np.where(off < distance, np.inf, off)), off.shape)
    wrong = planted(expert, row, place, followed=followed)
    with pytest.raises(AssertionError, match="do not follow"):
        wrong.assert_digits_follow()
    with pytest.raises(AssertionError, match="differ elsewhere than at a border"):
        expert.assert_same_up_to_a_border(in_matrix_order(wrong))


@each_run
def test_a_border_may_be_passed_if_all_digits_after_it_follow(run):
    expert = least_well_conditioned(run)
    row, place = np.unravel_index(np.argmin(unstandardized(expert)), (64, 128))
    flipped = planted(expert, row, place, followed=True)
    changed = np.argwhere(flipped.digits != expert.digits)
    assert len(changed) > 10 and set(changed[:, 0]) == {row} and changed[0, 1] == place
    flipped.assert_digits_follow()
    assert expert.assert_same_up_to_a_border(in_matrix_order(flipped)) > 0.98
    with pytest.raises(AssertionError, match="do not follow"):
        planted(expert, row, place, followed=False).assert_digits_follow()


@pytest.mark.parametrize("bits", ["1.5", "2"])
def test_wrong_levels_are_caught(bits):
    expert = replayed(RUNS[f"A.b{bits}_pd0.1_gs128_ao0"])[0]
    expert.assert_levels_follow()
    for wrong in ((33, 1, 0), (35, 0, 1)):
        levels = expert.levels.copy()
        levels[wrong] *= 1.001 if bits == "1.5" or wrong[2] == 0 else 2
        with pytest.raises(AssertionError):
            Replay(expert.problem, expert.digits, levels).assert_levels_follow()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("key", ["A.b1.5_pd0.01_gs128_ao1", "A.b2_pd0.01_gs-1_ao0"])
def test_rounding_as_of_another_cpu_passes(key, seed):
    """Every entry of the Hessian is off by as much as a unit in the last place."""
    for here, there in zip(replayed(RUNS[key]), replayed(RUNS[key], seed), strict=True):
        there.assert_digits_follow()
        there.assert_levels_follow()
        assert here.assert_same_up_to_a_border(in_matrix_order(there)) > 0.95


def test_the_tolerance_leaves_few_digits_undecided():
    for run in ILL_CONDITIONED:
        for expert in replayed(run):
            assert expert.at_a_border.mean() <= MOST_AT_A_BORDER


def test_an_order_is_determined_up_to_its_first_tie():
    hessian = np.diag(np.float32([1, 4, 3, 3, 9]))
    assert determined_places(hessian, np.array([4, 1, 2, 3, 0])) == 2
    assert determined_places(hessian, np.array([4, 1, 3, 2, 0])) == 2
    assert determined_places(hessian, None) == 5
    with pytest.raises(AssertionError):
        determined_places(hessian, np.array([1, 4, 2, 3, 0]))
