"""Hessians of routed tokens, summed batch by batch."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.quantization import add_tokens, empty_hessians
from qmoe_jax.quantization import hessian as hessian_module
from tests.helpers import golden

VECTORS = np.load(golden.DATA / "hessian_vectors.npz")


def routed(tokens=700, width=12, experts=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width), np.float32)
    # Uneven on purpose: most tokens go to expert 0, none to the last.
    expert = np.minimum(rng.geometric(0.6, tokens) - 1, experts - 2).astype(np.int32)
    return x, expert


def by_hand(x, expert, experts):
    return np.stack([x[expert == e].T @ x[expert == e] for e in range(experts)])


@pytest.mark.parametrize("name", ["x2d", "x2d_bf16"])
def test_the_sums_are_upstreams_hessian_but_for_its_factor(name):
    """Upstream divides by 2/n over n tokens."""
    x = VECTORS["x2d"] if name == "x2d" else VECTORS["x2d_bf16bits"].view(ml_dtypes.bfloat16)
    hessians = add_tokens(empty_hessians(1, x.shape[1]), x, np.zeros(len(x), np.int32))
    want = VECTORS[f"H_{name}"]
    np.testing.assert_allclose(hessians.sums[0] * (len(x) / 2), want, atol=5e-7 * np.abs(want).max(), rtol=0)


def test_upstreams_factor_of_three_dimensions_is_only_a_factor():
    """Upstream divides by the first axis (5), not by the number of tokens (45)."""
    x = VECTORS["x3d"].reshape(-1, 48)
    hessians = add_tokens(empty_hessians(1, 48), x, np.zeros(len(x), np.int32))
    want = VECTORS["H_x3d"]
    np.testing.assert_allclose(hessians.sums[0] * 5 / 2, want, atol=5e-7 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("tile", [1, 64, 1024])
def test_each_expert_gets_its_tokens(tile, monkeypatch):
    monkeypatch.setattr(hessian_module, "TILE", tile)
    jax.clear_caches()
    x, expert = routed()
    hessians = add_tokens(empty_hessians(5, 12), x, expert)
    np.testing.assert_array_equal(hessians.counts, np.bincount(expert, minlength=5))
    np.testing.assert_allclose(hessians.sums, by_hand(x, expert, 5), rtol=2e-6, atol=1e-4)
    assert hessians.counts[4] == 0
    assert not hessians.sums[4].any()


def test_hessians_of_batches_add_up():
    x, expert = routed()
    hessians = empty_hessians(5, 12)
    for part in np.array_split(np.arange(700), 3):
        hessians = add_tokens(hessians, x[part], expert[part])
    hessians = add_tokens(hessians, x[:0], expert[:0])
    np.testing.assert_array_equal(hessians.counts, np.bincount(expert, minlength=5))
    np.testing.assert_allclose(hessians.sums, by_hand(x, expert, 5), rtol=2e-6, atol=1e-4)


def test_tokens_of_other_experts_are_ignored():
    x, expert = routed()
    padding = np.arange(700) % 3 == 0
    x[padding] = np.nan  # whatever a padding token holds
    kept = np.where(padding, -1, expert - 1)
    hessians = add_tokens(empty_hessians(2, 12), x, kept)
    np.testing.assert_array_equal(hessians.counts, [(kept == 0).sum(), (kept == 1).sum()])
    np.testing.assert_allclose(hessians.sums, by_hand(x, kept, 2), rtol=2e-6, atol=1e-4)


def test_the_sums_are_float32_and_symmetric():
    x, expert = routed()
    hessians = add_tokens(empty_hessians(5, 12), jnp.asarray(x, jnp.bfloat16), expert)
    assert hessians.sums.dtype == jnp.float32
    np.testing.assert_allclose(hessians.sums, np.swapaxes(hessians.sums, 1, 2), rtol=1e-6, atol=1e-4)
