"""Every Pallas kernel lowers to Triton for an H100 on a machine without one, and it is the kernel asked for."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.matmul.pallas import packed_matmul as matmul
from pallas_kernels.matvec.pallas import matvec
from pallas_kernels.mlp.pallas import packed_mlp as mlp
from pallas_kernels.unpack.pallas import unpack as decode
from tests.helpers import packed_samples as samples

TRITON_CALL = "__gpu$xla.gpu.triton"


def lowered_for_cuda(function, *args) -> str:
    """The program that XLA for a GPU would get."""
    h100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def kernels(program: str) -> int:
    return program.count(f"stablehlo.custom_call @{TRITON_CALL}")


every_codebook = pytest.mark.parametrize("make", samples.CODEBOOKS.values(), ids=samples.CODEBOOKS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.mark.parametrize("op", [matvec, matmul], ids=["matvec", "matmul"])
@every_codebook
@every_dtype
def test_products_lower_to_one_triton_kernel(op, make, dtype):
    sample = samples.sample(make(), (4, 96, 200), levels=dtype)
    x, expert_index = samples.tokens(sample, 9, dtype=dtype)
    program = lowered_for_cuda(op, sample.packed, x, expert_index)
    assert kernels(program) == 1
    assert f"packed_{op.__name__.removeprefix('packed_')}" in program


@every_codebook
@every_dtype
def test_decoding_lowers_to_one_triton_kernel(make, dtype):
    packed = samples.sample(make(), (2, 96, 2100)).packed
    program = lowered_for_cuda(functools.partial(decode, dtype=jnp.dtype(dtype)), packed)
    assert kernels(program) == 1
    assert 'name = "unpack"' in program


@pytest.mark.parametrize("count, products", [(3, "packed_matvec"), (64, "packed_matmul")])
def test_an_expert_lowers_to_two_triton_kernels(count, products):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, wo = samples.sample(book, (4, 96, 64)), samples.sample(book, (4, 64, 96))
    x, expert_index = samples.tokens(wi, count)
    run = functools.partial(mlp, activation="relu")
    program = lowered_for_cuda(run, (wi.packed,), wo.packed, x, expert_index, jnp.ones(count))
    assert kernels(program) == 2
    assert program.count(f'name = "{products}"') == 2
