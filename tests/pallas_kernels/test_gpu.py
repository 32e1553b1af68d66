"""On a CUDA device: every op compiled and run there, against dense float64 and the reference backend.

`make gpu` runs these. Sums on tensor cores are rounded towards zero between steps, hence the wider bound
there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backend
from pallas_kernels.matmul.op import OP as MATMUL
from pallas_kernels.mlp.op import OP as MLP
from pallas_kernels.unpack.op import OP as UNPACK
from tests.helpers import packed_samples as samples
from tests.helpers.kernel_contract import assert_products, pallas_route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no CUDA device: jax sees none here"),
]

# Route: the bound on its products.
ROUTES = {"separate": 1e-6, "gather": 1e-6, "tensor_core": 2e-5}
SHAPES = {"single": (1, 1, 1), "odd": (3, 37, 131), "c-2048 rows": (2, 96, 6144), "base-128": (4, 768, 3072)}

every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
every_codebook = pytest.mark.parametrize("book", samples.CODEBOOKS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def test_the_pallas_kernels_are_the_default_here():
    for op in (MATMUL, MLP, UNPACK):
        assert backend.choose_backend(op) == "pallas"


@pytest.mark.parametrize("route, bound", ROUTES.items())
@every_codebook
@every_dtype
def test_every_route_with_every_codebook(route, bound, book, dtype):
    sample = samples.sample(samples.CODEBOOKS[book](), (3, 70, 201))
    x, expert_index = samples.tokens(sample, 77, dtype=dtype)
    found = jax.jit(pallas_route(route))(sample.packed, x, expert_index)
    assert_products(found, sample, x, expert_index, bound=bound)


@pytest.mark.parametrize("route, bound", ROUTES.items())
@every_shape
@pytest.mark.parametrize("levels", ["float32", "bfloat16"])
def test_every_route_at_every_shape(route, bound, shape, levels):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), shape, levels=levels)
    x, expert_index = samples.tokens(sample, 130)
    found = jax.jit(pallas_route(route))(sample.packed, x, expert_index)
    assert_products(found, sample, x, expert_index, bound=bound)


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_the_public_product_of_any_number_of_tokens(count):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (3, 37, 131))
    x, expert_index = samples.tokens(sample, count)
    found = pk.packed_matmul(sample.packed, x, expert_index, backend="pallas")
    assert_products(found, sample, x, expert_index, bound=2e-5)


@every_codebook
@every_dtype
def test_unpacked_weights_are_exact(book, dtype):
    sample = samples.sample(samples.CODEBOOKS[book](), (3, 37, 1131))
    found = pk.unpack(sample.packed, dtype, backend="pallas")
    assert (np.asarray(found, np.float64) == sample.weights).all()


@pytest.mark.parametrize("activation, gated", [("relu", False), ("gelu", True)])
@pytest.mark.parametrize("count", [1, 20, 600])
def test_an_expert_matches_the_reference(activation, gated, count, relative):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, gate = (samples.sample(book, (4, 200, 96), seed=seed).packed for seed in range(2))
    wo = samples.sample(book, (4, 96, 200), seed=2).packed
    x, expert_index = samples.tokens(samples.sample(book, (4, 200, 96)), count)
    pair = (wi, gate) if gated else wi
    arguments = pair, wo, x, expert_index, jnp.linspace(0.2, 0.9, count), activation
    found = pk.packed_mlp(*arguments, backend="pallas")
    assert relative(found, pk.packed_mlp(*arguments, backend="reference")) < 2e-5


def test_corrupt_streams_stay_in_bounds():
    packed = samples.sample(samples.CODEBOOKS["tunstall-8"](), (3, 5, 70)).packed
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 255, packed.codes.shape, endpoint=True).astype(np.uint8)
    offsets = rng.integers(-1000, 1000, packed.row_offsets.shape).astype(np.int32)
    damaged = pk.PackedMatrix(codes, offsets, packed.levels, packed.table, packed.width)
    for tokens in (2, 40, 300):
        x, index = jnp.ones((tokens, 70)), jnp.asarray(np.arange(tokens) % 5 - 1, jnp.int32)
        assert np.isfinite(np.asarray(pk.packed_matmul(damaged, x, index, backend="pallas"))).all()
