"""The contract of the ops, one suite for every backend: products and weights against dense float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.helpers import packed_samples as samples

# A row for each implementer: the arguments that select it.
BACKENDS = {
    "reference": {"backend": "reference"},
    "cpu": {"backend": "cpu"},
    "pallas": {"backend": "pallas", "interpret": True},
}
OPS = {"matvec": pk.packed_matvec, "matmul": pk.packed_matmul}
# Every codebook on a shape that is no multiple of anything; on the first one also the extremes: single elements,
# rows shorter than a codeword, many tokens. (experts, out, in), tokens.
CASES = {
    "tunstall-8-one": ("tunstall-8", (1, 1, 1), 1),
    "tunstall-8-short": ("tunstall-8", (2, 3, 5), 4),
    "tunstall-8-many": ("tunstall-8", (2, 5, 64), 75),
    **{name: (name, (3, 7, 131), 9) for name in samples.CODEBOOKS},
}

backend = pytest.mark.parametrize("chosen", BACKENDS.values(), ids=BACKENDS)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_case = pytest.mark.parametrize("book, shape, count", CASES.values(), ids=CASES)


def assert_products(found, sample, x, expert_index, *, units=0.5):
    """Within 1e-6 of the sum of |w x| for float32 sums, and one rounding of the output: half a unit of it."""
    exact, magnitude = samples.products(sample, x, expert_index)
    assert found.dtype == x.dtype
    rounding = units * jnp.finfo(x.dtype).eps * np.abs(exact)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= 1e-6 * magnitude + rounding + 1e-30).all()


@backend
@every_op
@every_case
def test_products(chosen, op, book, shape, count):
    sample = samples.sample(samples.CODEBOOKS[book](), shape)
    x, expert_index = samples.tokens(sample, count)
    assert_products(op(sample.packed, x, expert_index, **chosen), sample, x, expert_index)


@backend
@every_op
def test_densities_other_than_the_codebooks(chosen, op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (3, 4, 77), p_zero=[0.0, 0.3, 1.0])
    x, expert_index = samples.tokens(sample, 6)
    assert_products(op(sample.packed, x, expert_index, **chosen), sample, x, expert_index)


@backend
@every_op
def test_bfloat16_tokens_and_float32_levels(chosen, op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (3, 6, 40), levels="float32")
    x, expert_index = samples.tokens(sample, 7, dtype="bfloat16")
    assert_products(op(sample.packed, x, expert_index, **chosen), sample, x, expert_index)


@backend
@every_op
def test_no_token(chosen, op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 5))
    x, expert_index = samples.tokens(sample, 0)
    assert op(sample.packed, x, expert_index, **chosen).shape == (0, 3)


@backend
@every_op
def test_expert_out_of_range_is_the_nearest(chosen, op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 40))
    x, _ = samples.tokens(sample, 2)
    found = op(sample.packed, x, jnp.array([-5, 99], jnp.int32), **chosen)
    assert_products(found, sample, x, jnp.array([0, 1], jnp.int32))


@backend
@every_op
def test_under_jit_and_vmap_over_layers(chosen, op):
    layers = [samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 4, 60), seed=seed) for seed in range(3)]
    capacity = max(layer.packed.codes.shape[1] for layer in layers)
    padded = [
        dataclasses.replace(p, codes=np.pad(p.codes, ((0, 0), (0, capacity - p.codes.shape[1]))))
        for p, _ in layers
    ]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *padded)
    x, expert_index = samples.tokens(layers[0], 3)
    run = jax.jit(jax.vmap(functools.partial(op, **chosen), in_axes=(0, None, None)))
    for found, layer in zip(run(stacked, x, expert_index), layers, strict=True):
        assert_products(found, layer, x, expert_index)


@backend
@every_op
def test_no_derivative(chosen, op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (1, 2, 3))
    x, expert_index = samples.tokens(sample, 1)
    with pytest.raises(NotImplementedError, match=r"no derivative.*unpack"):
        jax.grad(lambda x: op(sample.packed, x, expert_index, **chosen).sum())(x)


@backend
@every_case
def test_unpack(chosen, book, shape, count):
    sample = samples.sample(samples.CODEBOOKS[book](), shape)
    dtype = jnp.dtype("float32" if count < 9 else "bfloat16")
    found = pk.unpack(sample.packed, dtype, **chosen)
    assert found.dtype == dtype
    assert (np.asarray(found, np.float64) == sample.weights).all()


@backend
@pytest.mark.parametrize("activation, gated, count", [("relu", False, 1), ("gelu", True, 40)])
def test_mlp(chosen, activation, gated, count, relative):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, gate = (samples.sample(book, (2, 48, 16), seed=seed, p_zero=0.6) for seed in range(2))
    wo = samples.sample(book, (2, 16, 48), seed=2, p_zero=0.6)
    x, expert_index = samples.tokens(wi, count)
    scale = jnp.linspace(0.2, 0.9, count)
    hidden = jax.nn.relu if activation == "relu" else jax.nn.gelu
    wanted = hidden(np.float32(samples.products(wi, x, expert_index)[0]))
    if gated:
        wanted = wanted * samples.products(gate, x, expert_index)[0].astype(np.float32)
    wanted = np.asarray(scale)[:, None] * samples.products(wo, wanted, expert_index)[0]
    pair = (wi.packed, gate.packed) if gated else wi.packed
    found = pk.packed_mlp(pair, wo.packed, x, expert_index, scale, activation, **chosen)
    assert relative(found, wanted) < 2e-6


@backend
def test_mlp_without_scale_in_bfloat16(chosen, relative):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, wo = samples.sample(book, (2, 48, 16)), samples.sample(book, (2, 16, 48))
    x, expert_index = samples.tokens(wi, 6, dtype="bfloat16")
    found = pk.packed_mlp(wi.packed, wo.packed, x, expert_index, **chosen)
    exact = pk.packed_mlp(wi.packed, wo.packed, x.astype(jnp.float32), expert_index, backend="reference")
    assert found.dtype == jnp.bfloat16
    assert relative(found, exact) < 2**-8
