"""GPTQ against upstream's outputs, and its invariances."""

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

every_run = pytest.mark.parametrize("run", golden.RUNS, ids=lambda run: run.key)
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


def reconstruction_error(w, values, hessian) -> np.ndarray:
    """tr((Q - W) H (Q - W)ᵀ) of each expert, H not damped."""
    deviation = np.asarray(values, np.float64) - w
    return np.einsum("eoi,eij,eoj->e", deviation, hessian.astype(np.float64), deviation, optimize=True)


def example(experts=3, out=5, width=40, tokens=200, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) / width**0.5
    x = (rng.standard_normal((experts, tokens, width)) @ mix).astype(np.float32)
    return rng.standard_normal((experts, out, width), np.float32), x.swapaxes(1, 2) @ x


def assert_same(a: Quantized, b: Quantized) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Upstream's outputs


@every_run
def test_values_are_upstreams(run):
    """Without groups all digits are equal, and the values are bit for bit those of the levels."""
    got, want = np.array(quantized(run).values), run.values
    if run.tie:
        got[run.tie] = want[run.tie]
    got, want = (np.delete(values, run.exempt, axis=0) for values in (got, want))
    if run.group_size is None:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


@every_run
def test_the_reconstruction_error_is_upstreams(run):
    if run.bfloat16:
        pytest.skip("upstream did not print it")
    w, hessian = golden.vectors[f"{run.case}.W"], golden.hessian(run.case)
    sound = np.isfinite(hessian).all((1, 2))
    sound[run.exempt] = False
    got = reconstruction_error(w[sound], quantized(run).values[sound], hessian[sound])
    want = np.array(golden.meta[run.key]["recon_trDHDt_per_expert"], np.float64)[sound]
    np.testing.assert_allclose(got, want, rtol=2e-4)


@every_run
def test_the_error_is_what_upstream_prints(run):
    if run.bfloat16:
        pytest.skip("upstream did not print it")
    q = quantized(run)
    kept = ~np.asarray(q.fallback)
    kept[run.exempt] = False
    np.testing.assert_allclose(
        q.error[kept], np.array(golden.meta[run.key]["printed_error_per_expert"])[kept], rtol=2e-4
    )


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


@pytest.mark.parametrize(
    "bits, out, width", [(None, 1, 1), (3, 2, 5), (None, 3, 128), (None, 3, 129), (3, 1, 300)]
)
def test_odd_sizes(bits, out, width):
    w, hessian = example(2, out, width, tokens=2 * width + 3)
    q = gptq(w, hessian, ternary_grid() if bits is None else uniform_grid(bits))
    for expert in range(2):
        values, digits = gptq_reference(w[expert], hessian[expert], bits)
        np.testing.assert_array_equal(q.digits[expert], digits)
        np.testing.assert_array_equal(q.values[expert], values)


@pytest.mark.parametrize(
    "block_size, group_size, activation_order",
    [(32, 48, False), (32, 7, True), (32, 33, False), (24, 100, False), (128, 90, True), (10, 10, False)],
)
def test_groups_that_straddle_blocks(block_size, group_size, activation_order):
    w, hessian = example(2, 4, 107, tokens=300)
    options = {"block_size": block_size, "group_size": group_size, "activation_order": activation_order}
    q = gptq(w, hessian, uniform_grid(bits=4), **options)
    assert q.levels.shape == (2, 4, -(-107 // group_size), 2)
    for expert in range(2):
        values, digits = gptq_reference(w[expert], hessian[expert], 4, **options)
        np.testing.assert_array_equal(q.digits[expert], digits)
        np.testing.assert_allclose(q.values[expert], values, rtol=1e-4, atol=1e-6)


# The kernel of a block


def test_the_pallas_kernel_gives_the_same_digits():
    w, hessian = example(2, 5, 40)
    options = {"block_size": 10, "group_size": 12, "activation_order": True}
    got = gptq(w, hessian, ternary_grid(), **options, backend="pallas_interpret")
    want = gptq(w, hessian, ternary_grid(), **options)
    np.testing.assert_array_equal(got.digits, want.digits)
    np.testing.assert_allclose(got.values, want.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.error, want.error, rtol=1e-5)


def test_a_gpu_rounds_the_blocks_of_all_experts_in_one_kernel():
    w, hessian = example(3, 5, 64)
    h100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    factor = factorize(hessian)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        traced = gptq_with_factor.trace(w, factor, ternary_grid(), block_size=16)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count('name = "quantize_block"') == 1


# Invariances


@pytest.mark.parametrize("group_size", [None, 16])
def test_other_experts_do_not_matter(group_size):
    """Padding experts, even with garbage for a Hessian, change nothing in the others."""
    w, hessian = example()
    alone = gptq(w, hessian, ternary_grid(), group_size=group_size)
    garbage = np.stack([np.zeros_like(hessian[0]), np.full_like(hessian[0], np.nan)])
    padded = gptq(
        np.concatenate([w, np.zeros_like(w[:2])]),
        np.concatenate([hessian, garbage]),
        ternary_grid(),
        group_size=group_size,
    )
    np.testing.assert_array_equal(padded.digits[:3], alone.digits)
    np.testing.assert_array_equal(padded.values[:3], alone.values)
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
    nearest = reconstruction_error(w, round_to_nearest(w, grid).values, hessian)
    assert got.sum() < nearest.sum()


@pytest.mark.parametrize("block_size", [1, 48])
def test_the_block_size_does_not_matter_without_groups(block_size):
    w, hessian = example(width=100)
    want = gptq(w, hessian, uniform_grid(bits=4)).digits
    np.testing.assert_array_equal(gptq(w, hessian, uniform_grid(bits=4), block_size=block_size).digits, want)


def test_activation_order_is_a_permutation_of_the_problem():
    w, hessian = example()
    order = np.stack([np.argsort(-np.diagonal(h), kind="stable") for h in hessian])
    inside = gptq(w, hessian, ternary_grid(), activation_order=True)
    sorted_w = np.take_along_axis(w, order[:, None], axis=2)
    sorted_h = np.stack([h[np.ix_(p, p)] for h, p in zip(hessian, order, strict=True)])
    outside = gptq(sorted_w, sorted_h, ternary_grid())
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(inside.digits), order[:, None], axis=2), outside.digits
    )


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
        ({"damping": -0.1}, "damping must be >= 0, found -0.1"),
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
