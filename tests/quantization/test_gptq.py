"""GPTQ against upstream's outputs, and its invariances; digits are compared as `golden_digits` explains."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from qmoe_jax.quantization import (
    Quantized,
    factorize,
    gptq,
    gptq_with_factor,
    round_to_nearest,
    ternary_grid,
    uniform_grid,
)
from qmoe_jax.quantization.reference import gptq_reference
from tests.helpers import golden
from tests.helpers.golden_digits import Problem, Replay, determined_places

every_run = pytest.mark.parametrize("run", golden.RUNS, ids=lambda run: run.key)
EQUAL_DIGITS = 0.98  # of a run's: a row in fifty may meet a border where another CPU falls on the other side
some = hypothesis.settings(deadline=None, max_examples=10, derandomize=True)


@functools.cache
def quantized(run: golden.Run) -> Quantized:
    w = golden.vectors[f"{run.case}.W"]
    return gptq(
        w.astype(ml_dtypes.bfloat16) if run.bfloat16 else w,
        golden.hessian(run.case),
        golden.grid_of(run.bits),
        damping=run.damping,
        group_size=run.group_size,
        activation_order=run.activation_order,
    )


def row_errors(w, values, hessian) -> np.ndarray:
    """(Q - W) H (Q - W)ᵀ of each row, H not damped."""
    deviation = np.asarray(values, np.float64) - w
    return np.einsum("...i,ij,...j->...", deviation, hessian.astype(np.float64), deviation, optimize=True)


def reconstruction_error(w, values, hessian) -> float:
    """The sum of all experts' `row_errors`."""
    return sum(row_errors(*expert).sum() for expert in zip(w, np.asarray(values), hessian, strict=True))


def replays_of(q: Quantized, w, hessian, bits=None, *, activation_order=False, **options) -> list[Replay]:
    """Each expert's digits, to be judged in float64."""
    order = factorize(hessian, options.get("damping", 0.1), activation_order=True).order
    return [
        Problem.of(
            np.asarray(w[number], np.float32),
            hessian[number],
            bits,
            order=order[number] if activation_order else None,
            fallback=bool(q.fallback[number]),
            **options,
        ).replay(q.digits[number], q.levels[number])
        for number in range(len(w))
    ]


@functools.cache
def replays(run: golden.Run) -> list[Replay]:
    w = golden.vectors[f"{run.case}.W"]
    return replays_of(
        quantized(run),
        w.astype(ml_dtypes.bfloat16) if run.bfloat16 else w,
        golden.hessian(run.case),
        None if run.bits == "1.5" else int(run.bits),
        damping=run.damping,
        group_size=run.group_size,
        activation_order=run.activation_order,
    )


@functools.cache
def determined(run: golden.Run) -> list[int]:
    """Number of leading columns of each expert that upstream cannot have taken in another order.

    Its sort is not stable. Without a Hessian and without groups no order matters.
    """
    free = np.asarray(quantized(run).fallback) & (run.group_size is None)
    return [
        256 if free[number] or not run.activation_order else determined_places(hessian, expert.problem.order)
        for number, (hessian, expert) in enumerate(zip(golden.hessian(run.case), replays(run), strict=True))
    ]


@functools.cache
def upstreams_digits(run: golden.Run, number: int) -> np.ndarray:
    """The digits whose values under our levels are nearest to upstream's values."""
    expert, values = replays(run)[number], run.values[number]
    problem, levels = expert.problem, expert.column_levels
    digits = np.empty(values.shape, int)
    every = range(3 if problem.bits is None else 2**problem.bits)
    at = [problem.values(np.full(values.shape, digit), levels) for digit in every]
    digits[:, problem.order] = np.argmin(np.abs(np.stack(at) - values[:, problem.order]), 0)
    return digits


def example(experts=3, out=5, width=40, tokens=200, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) / width**0.5
    x = (rng.standard_normal((experts, tokens, width)) @ mix).astype(np.float32)
    return rng.standard_normal((experts, out, width), np.float32), x.swapaxes(1, 2) @ x


def assert_same(a: Quantized, b: Quantized) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Upstream's outputs


@every_run
def test_every_digit_and_level_follows_from_those_before(run):
    for expert in replays(run):
        expert.assert_digits_follow()
        expert.assert_levels_follow()


@every_run
def test_digits_are_upstreams_up_to_a_border(run):
    """Row by row; with groups only as far as ties in the activation order leave no choice."""
    shares = [
        expert.assert_same_up_to_a_border(upstreams_digits(run, number), places)
        for number, (expert, places) in enumerate(zip(replays(run), determined(run), strict=True))
    ]
    assert np.mean(shares) >= EQUAL_DIGITS, shares


@every_run
def test_values_are_upstreams_where_digits_are(run):
    """Without groups bit for bit; else as exactly as float32 finds the levels of a group."""
    got, want = np.asarray(quantized(run).values), run.values
    for number, (expert, places) in enumerate(zip(replays(run), determined(run), strict=True)):
        order, same = expert.problem.order, expert.before_a_difference(upstreams_digits(run, number))
        same[:, places:] = False
        off = np.abs(got[number] - want[number])[:, order]
        allowed = 0 if run.group_size is None else expert.level_tolerance
        assert (off <= allowed)[same].all()


@every_run
def test_the_error_is_that_of_the_values(run):
    """½ tr(D H Dᵀ) with the damped Hessian, the identity after a fallback."""
    want = [expert.row_error.sum() for expert in replays(run)]
    np.testing.assert_allclose(quantized(run).error, want, rtol=2e-4)


@every_run
def test_errors_are_upstreams(run):
    """Errors as upstream printed and as its program measured them, for experts with a usable Hessian.

    A row whose digits differ from upstream's, as they may from a border on, may have any error up to the
    larger of the two rows'; the experts that count are those whose order is determined.
    """
    if run.bfloat16:
        pytest.skip("upstream did not print it")
    w, q = golden.vectors[f"{run.case}.W"], quantized(run)
    printed = golden.meta[run.key]["printed_error_per_expert"]
    reconstruction = golden.meta[run.key]["recon_trDHDt_per_expert"]
    compared = 0
    for number, (expert, places) in enumerate(zip(replays(run), determined(run), strict=True)):
        if q.fallback[number] or places < w.shape[2]:
            continue
        upstreams = expert.problem.replay(upstreams_digits(run, number), q.levels[number])
        differs = (expert.digits != upstreams.digits).any(1)
        for found, theirs, want in (
            (q.error[number], (expert.row_error, upstreams.row_error), printed[number]),
            (
                row_errors(w[number], q.values[number], golden.hessian(run.case)[number]).sum(),
                [
                    row_errors(w[number], values[number], golden.hessian(run.case)[number])
                    for values in (np.asarray(q.values), run.values)
                ],
                reconstruction[number],
            ),
        ):
            np.testing.assert_allclose(found, want, rtol=2e-4, atol=np.maximum(*theirs)[differs].sum())
        compared += 1
    assert compared >= 2


@every_run
def test_experts_without_a_usable_hessian_fall_back_and_are_flagged(run):
    """A: expert 1 got no tokens. S: expert 1 is indefinite, expert 3 holds a NaN."""
    q = quantized(run)
    np.testing.assert_array_equal(np.flatnonzero(q.fallback), [1] if run.case == "A" else [1, 3])
    if run.group_size is None and not run.bfloat16:
        w = golden.vectors[f"{run.case}.W"]
        nearest = round_to_nearest(w, golden.grid_of(run.bits))
        np.testing.assert_array_equal(q.values[q.fallback], nearest.values[q.fallback])
        np.testing.assert_allclose(q.error[q.fallback], nearest.error[q.fallback], rtol=1e-4)


@every_run
def test_values_are_the_digits_under_the_levels_of_their_group(run):
    q, grid = quantized(run), golden.grid_of(run.bits)
    levels = jnp.take_along_axis(q.levels, q.group_index[:, None, :, None], axis=2)
    np.testing.assert_array_equal(grid.value(q.digits, jnp.unstack(levels, axis=-1)), q.values)


# The textbook, at odd sizes


def assert_follows(q: Quantized, w, hessian, bits=None, **options) -> list[Replay]:
    """Judge every expert's digits and levels in float64."""
    judged = replays_of(q, w, hessian, bits, **options)
    for expert in judged:
        expert.assert_digits_follow()
        expert.assert_levels_follow()
    return judged


def assert_same_up_to_borders(q: Quantized, other: Quantized, w, hessian, bits=None, **options) -> None:
    """Check that both follow the rule and that each row of the two is equal up to a border."""
    judged = assert_follows(q, w, hessian, bits, **options)
    others = assert_follows(other, w, hessian, bits, **options)
    for number, (mine, theirs) in enumerate(zip(judged, others, strict=True)):
        mine.assert_same_up_to_a_border(other.digits[number])
        same = mine.before_a_difference(other.digits[number])
        off = np.abs(np.asarray(q.values[number]) - np.asarray(other.values[number]))[:, mine.problem.order]
        assert (off <= mine.level_tolerance)[same].all()
        differs = np.maximum(mine.row_error, theirs.row_error)[~same.all(1)].sum()
        np.testing.assert_allclose(q.error[number], other.error[number], rtol=1e-4, atol=differs)


def assert_matches_the_reference(w, hessian, bits, **options) -> None:
    """The reference in float64 against ours in float32, expert by expert."""
    q = gptq(w, hessian, ternary_grid() if bits is None else uniform_grid(bits), **options)
    for number, expert in enumerate(assert_follows(q, w, hessian, bits, **options)):
        values, digits = gptq_reference(w[number].astype(float), hessian[number], bits, **options)
        expert.assert_same_up_to_a_border(digits)
        order, same = expert.problem.order, expert.before_a_difference(digits)
        off = np.abs(q.values[number] - values)[:, order]
        rounding = 2.0**-21 * np.abs(expert.column_levels).max(-1)
        assert (off <= expert.level_tolerance + rounding)[same].all()


@pytest.mark.parametrize(
    "bits, out, width", [(None, 1, 1), (3, 2, 5), (None, 3, 128), (None, 3, 129), (3, 1, 300)]
)
def test_gptq_matches_the_reference_at_odd_sizes(bits, out, width):
    w, hessian = example(2, out, width, tokens=2 * width + 3)
    assert_matches_the_reference(w, hessian, bits)


@pytest.mark.parametrize(
    "block_size, group_size, activation_order",
    [(32, 48, False), (32, 7, True), (32, 33, False), (24, 100, False), (128, 90, True), (10, 10, False)],
)
def test_gptq_matches_the_reference_where_groups_straddle_blocks(block_size, group_size, activation_order):
    w, hessian = example(2, 4, 107, tokens=300)
    options = {"block_size": block_size, "group_size": group_size, "activation_order": activation_order}
    assert gptq(w, hessian, uniform_grid(bits=4), **options).levels.shape == (2, 4, -(-107 // group_size), 2)
    assert_matches_the_reference(w, hessian, 4, **options)


# The kernel of a block


def test_the_pallas_kernel_gives_the_same_digits():
    w, hessian = example(2, 5, 40)
    options = {"block_size": 10, "group_size": 12, "activation_order": True}
    got = gptq(w, hessian, ternary_grid(), **options, backend="pallas_interpret")
    want = gptq(w, hessian, ternary_grid(), **options)
    assert_same_up_to_borders(got, want, w, hessian, **options)


def test_a_gpu_rounds_the_blocks_of_all_experts_in_one_kernel():
    w, hessian = example(3, 5, 64)
    h100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    factor = factorize(hessian)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        traced = jax.jit(functools.partial(gptq_with_factor, block_size=16)).trace(w, factor, ternary_grid())
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count('name = "quantize_block"') == 1


# Invariances


@pytest.mark.parametrize("group_size", [None, 16])
def test_other_experts_do_not_matter(group_size):
    """Padding experts, even with garbage for a Hessian, change nothing in the others."""
    w, hessian = example()
    garbage = np.stack([np.zeros_like(hessian[0]), np.full_like(hessian[0], np.nan)])
    padded = gptq(
        np.concatenate([w, np.zeros_like(w[:2])]),
        np.concatenate([hessian, garbage]),
        ternary_grid(),
        group_size=group_size,
    )
    alone = gptq(w, hessian, ternary_grid(), group_size=group_size)
    assert_same_up_to_borders(jax.tree.map(lambda x: x[:3], padded), alone, w, hessian, group_size=group_size)
    np.testing.assert_array_equal(padded.fallback, [False] * 3 + [True] * 2)
    np.testing.assert_array_equal(padded.values[3:], np.zeros_like(w[:2]))


@some
@hypothesis.given(seed=st.integers(0, 99), bits=st.sampled_from([None, 2]))
def test_the_identity_hessian_rounds_to_nearest(seed, bits):
    w, hessian = example(seed=seed)
    grid = ternary_grid() if bits is None else uniform_grid(bits)
    q = gptq(w, np.broadcast_to(np.eye(40, dtype=np.float32), hessian.shape), grid, damping=0.0)
    np.testing.assert_array_equal(q.values, round_to_nearest(w, grid).values)
    assert not q.fallback.any()


@some
@hypothesis.given(seed=st.integers(0, 99), bits=st.sampled_from([None, 2]))
def test_quantized_weights_stay_as_they_are(seed, bits):
    w, hessian = example(seed=seed)
    grid = ternary_grid() if bits is None else uniform_grid(bits)
    once = round_to_nearest(w, grid).values
    again = gptq(once, hessian, grid)
    np.testing.assert_allclose(again.values, once, atol=1e-6)
    np.testing.assert_allclose(again.error, 0, atol=1e-8)


@some
@hypothesis.given(seed=st.integers(0, 99), log_scale=st.integers(-6, 6))
def test_the_scale_of_the_hessian_does_not_matter(seed, log_scale):
    w, hessian = example(seed=seed)
    scaled = gptq(w, hessian * np.float32(4.0**log_scale), ternary_grid())  # powers of 4 keep the roots exact
    np.testing.assert_array_equal(scaled.digits, gptq(w, hessian, ternary_grid()).digits)


@some
@hypothesis.given(seed=st.integers(0, 99), bits=st.sampled_from([None, 2]))
def test_it_beats_rounding_to_nearest(seed, bits):
    w, hessian = example(tokens=60, seed=seed)
    grid = ternary_grid() if bits is None else uniform_grid(bits)
    got = reconstruction_error(w, gptq(w, hessian, grid, damping=0.01).values, hessian)
    assert got < reconstruction_error(w, round_to_nearest(w, grid).values, hessian)


@pytest.mark.parametrize("block_size", [1, 48])
def test_the_block_size_does_not_matter_without_groups(block_size):
    w, hessian = example(width=100)
    want = gptq(w, hessian, uniform_grid(bits=4))
    assert_same_up_to_borders(
        gptq(w, hessian, uniform_grid(bits=4), block_size=block_size), want, w, hessian, 4
    )


def test_activation_order_is_a_permutation_of_the_problem():
    w, hessian = example()
    order = np.stack([np.argsort(-np.diagonal(h), kind="stable") for h in hessian])
    inside = gptq(w, hessian, ternary_grid(), activation_order=True)
    sorted_w = np.take_along_axis(w, order[:, None], axis=2)
    sorted_h = np.stack([h[np.ix_(p, p)] for h, p in zip(hessian, order, strict=True)])
    sort = lambda x: jnp.take_along_axis(x, order[:, None], axis=2)
    resorted = dataclasses.replace(inside, values=sort(inside.values), digits=sort(inside.digits))
    assert_same_up_to_borders(resorted, gptq(sorted_w, sorted_h, ternary_grid()), sorted_w, sorted_h)


def test_a_group_as_wide_as_the_row_is_no_group():
    w, hessian = example()
    assert_same(gptq(w, hessian, ternary_grid(), group_size=40), gptq(w, hessian, ternary_grid()))
    assert_same(gptq(w, hessian, ternary_grid(), group_size=999), gptq(w, hessian, ternary_grid()))


def test_a_nan_weight_shows_in_the_error():
    w, hessian = example()
    w[1, 2, 3] = np.nan
    np.testing.assert_array_equal(np.isnan(gptq(w, hessian, ternary_grid()).error), [False, True, False])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"damping": -0.1}, "damping must be finite and >= 0, found -0.1"),
        ({"group_size": 0}, "block_size and group_size must be >= 1, found 128 and 0"),
        ({"block_size": 0}, "block_size and group_size must be >= 1, found 0 and None"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    w, hessian = example()
    with pytest.raises(ValueError, match=message):
        gptq(**{"w": w, "hessian": hessian, "grid": ternary_grid()} | change)


def test_a_hessian_of_another_width_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    w, hessian = example()
    with pytest.raises(ValueError, match=r"need a hessian of shape \(3, 40, 40\), found \(3, 4, 4\)"):
        gptq(w, hessian[:, :4, :4], ternary_grid())


def test_the_program_does_not_grow_with_the_matrix():
    """No loop over columns or blocks is unrolled."""

    def size(width: int) -> int:
        w = jax.ShapeDtypeStruct((1, 4, width), np.float32)
        hessian = jax.ShapeDtypeStruct((1, width, width), np.float32)
        program = jax.make_jaxpr(lambda w, h: gptq(w, h, ternary_grid(), group_size=64))(w, hessian)
        return len(str(program).splitlines())

    assert size(2048) <= 1.05 * size(256)
