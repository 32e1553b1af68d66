"""Every route of the Pallas product matches dense float64, whatever its configuration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.matmul.epilogue import Epilogue
from pallas_kernels.matmul.pallas import gather, separate, tensor_core
from pallas_kernels.matmul.routes import Overrides, packed_matmul, route_for
from pallas_kernels.mlp.pallas import packed_mlp
from tests.helpers import packed_samples as samples
from tests.helpers.kernel_contract import PALLAS_ROUTES, assert_products, pallas_route
from tests.helpers.lowering import kernels, lowered_for_cuda

CONFIGS = {
    "separate": separate.Config(rows=2, tile=16, warps=1),
    "gather": gather.Config(tile=16, lanes=8, warps=1),
    "tensor_core": tensor_core.Config(rows=16, tile=16, lanes=16, columns=32, warps=4, stages=2, programs=2),
}
every_route = pytest.mark.parametrize("route, kernel", PALLAS_ROUTES.values(), ids=PALLAS_ROUTES)
on_tensor_cores = pallas_route("tensor_core", interpret=True, **CONFIGS)


@pytest.fixture(scope="module")
def sample():
    """Rows and columns that no block divides; an expert without tokens, one with several blocks."""
    return samples.sample(samples.CODEBOOKS["tunstall-8"](), (4, 37, 83))


@pytest.mark.parametrize("book", ["upstream", "tunstall-12-dense"])
def test_other_codebooks_on_tensor_cores(book):
    """The other routes meet all codebooks in test_contract."""
    sample = samples.sample(samples.CODEBOOKS[book](), (2, 5, 131))
    x, expert_index = samples.tokens(sample, 9)
    found = on_tensor_cores(sample.packed, x, expert_index)
    assert_products(found, sample, x, expert_index)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("levels", ["float32", "bfloat16"])
def test_dtypes_of_tokens_and_levels_on_tensor_cores(dtype, levels):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (4, 37, 83), levels=levels)
    x, expert_index = samples.tokens(sample, 50, dtype=dtype)
    found = on_tensor_cores(sample.packed, x, expert_index)
    assert_products(found, sample, x, expert_index)


def test_all_tokens_on_one_expert_on_tensor_cores(sample):
    x, _ = samples.tokens(sample, 40)
    expert_index = jnp.full(40, 2, jnp.int32)
    found = on_tensor_cores(sample.packed, x, expert_index)
    assert_products(found, sample, x, expert_index)


@every_route
def test_an_epilogue_is_applied_to_float32_sums(sample, route, kernel, relative):
    x, expert_index = samples.tokens(sample, 12, dtype="bfloat16")
    chosen = route_for(
        sample.packed, x.dtype, expert_index, Overrides(route=route, **CONFIGS), interpret=True
    )
    gate, scale = jnp.full((12, 37), 0.5), jnp.linspace(0.1, 1, 12)
    epilogue = Epilogue(chosen.enter(gate), chosen.enter_scale(scale), "relu")
    found = chosen.leave(chosen.product(sample.packed, chosen.enter(x), epilogue, jnp.float32))
    exact, _ = samples.products(sample, x, expert_index)
    assert relative(found, np.maximum(exact, 0) * 0.5 * np.asarray(scale)[:, None]) < 1e-6


@every_route
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_lowers_to_one_kernel_per_matrix(route, kernel, gated, dtype):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, wo = samples.sample(book, (4, 96, 64)).packed, samples.sample(book, (4, 64, 96)).packed
    wide = (wi, wi) if gated else (wi,)
    x, index, scale = jnp.ones((64, 64), dtype), jnp.zeros(64, jnp.int32), jnp.ones(64)
    overrides = Overrides(route=route, **CONFIGS)
    function = functools.partial(packed_mlp, activation="gelu" if gated else "relu", overrides=overrides)
    program = lowered_for_cuda(function, wide, wo, x, index, scale)
    assert kernels(program) == program.count(f'name = "{kernel}"') == len(wide) + 1


def test_the_default_route_follows_the_tokens_per_expert():
    packed = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 8, 64)).packed
    for count, kernel in (
        (3, "packed_matmul_separate"),
        (4, "packed_matmul_gather"),
        (128, "packed_matmul_tensor_core"),
    ):
        program = lowered_for_cuda(packed_matmul, packed, jnp.ones((count, 64)), jnp.zeros(count, jnp.int32))
        assert f'name = "{kernel}"' in program


def test_float32_is_the_sum_of_three_bfloat16_exactly():
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal(10000) * 10.0 ** rng.integers(-20, 20, 10000)).reshape(100, 100)
    parts = [np.asarray(part, np.float64) for part in jax.jit(tensor_core.bfloat16_parts)(jnp.asarray(x))]
    assert (sum(parts) == x).all()


def large(capacity: int):
    """Shapes of a matrix with 3 experts of `capacity` one-byte codes."""
    packed = samples.sample(samples.CODEBOOKS["tunstall-8"](), (1, 2, 30)).packed
    codes = jax.ShapeDtypeStruct((3, capacity), jnp.uint8)
    three = [jax.ShapeDtypeStruct((3, *a.shape[1:]), a.dtype) for a in (packed.row_offsets, packed.levels)]
    return jax.tree.unflatten(jax.tree.structure(packed), [codes, *three, packed.table.entries])


TOKENS = jax.ShapeDtypeStruct((1, 30), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)


@pytest.mark.parametrize(
    "capacity, element",
    [(2**29, "ui8"), (2**30, "ui16"), (3 * 2**29, "ui8")],
    ids=["1.5 GiB", "3 GiB", "4.5 GiB"],
)
def test_codes_of_two_to_four_gib_are_read_in_pairs(capacity, element):
    """Between them, 32-bit offsets of single bytes exceed 31 bits; above, offsets are 64-bit."""
    program = lowered_for_cuda(packed_matmul, large(capacity), *TOKENS)
    call = next(line for line in program.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line)
    operands = call.rsplit(" : (", 1)[1]
    assert operands.startswith(f"tensor<3x{capacity if element == 'ui8' else capacity // 2}x{element}>")


def test_codes_of_two_to_four_gib_need_an_even_capacity():
    with pytest.raises(NotImplementedError, match="pad the codes to an even capacity"):
        jax.eval_shape(packed_matmul, large(2**30 + 1), *TOKENS)


def test_pairs_of_codes_are_the_same_codes(sample, monkeypatch):
    packed = sample.packed
    even = jax.tree.map(np.asarray, packed)
    pad = packed.codes.shape[1] % 2
    even = type(packed)(
        np.pad(packed.codes, ((0, 0), (0, pad))), *jax.tree.leaves(packed)[1:3], packed.table, 83
    )
    monkeypatch.setattr("pallas_kernels.tiles.SIGNED_OFFSETS", 16)
    x, expert_index = samples.tokens(sample, 5)
    found = pk.packed_matmul(even, x, expert_index, backend=pallas_route("separate", interpret=True))
    assert_products(found, sample, x, expert_index)
