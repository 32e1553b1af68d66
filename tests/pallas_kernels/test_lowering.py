"""Every Pallas kernel lowers to Triton for an H100 on a machine without one, under its own name."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.matmul.routes import packed_matmul
from pallas_kernels.mlp.pallas import packed_mlp
from pallas_kernels.unpack.pallas import unpack
from tests.helpers import packed_samples as samples
from tests.helpers.lowering import kernels, lowered_for_cuda

every_codebook = pytest.mark.parametrize("make", samples.CODEBOOKS.values(), ids=samples.CODEBOOKS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.mark.parametrize(
    "count, kernel",
    [(7, "packed_matmul_separate"), (9, "packed_matmul_gather"), (300, "packed_matmul_tensor_core")],
)
@every_codebook
@every_dtype
def test_a_product_lowers_to_one_triton_kernel(count, kernel, make, dtype):
    sample = samples.sample(make(), (4, 96, 200), levels=dtype)
    x, expert_index = samples.tokens(sample, count, dtype=dtype)
    program = lowered_for_cuda(packed_matmul, sample.packed, x, expert_index)
    assert kernels(program) == program.count(f'name = "{kernel}"') == 1


@every_codebook
@every_dtype
def test_unpacking_lowers_to_one_triton_kernel(make, dtype):
    packed = samples.sample(make(), (2, 96, 2100)).packed
    program = lowered_for_cuda(functools.partial(unpack, dtype=jnp.dtype(dtype)), packed)
    assert kernels(program) == program.count('name = "unpack"') == 1


@pytest.mark.parametrize("count, kernel", [(3, "packed_matmul_separate"), (64, "packed_matmul_gather")])
def test_an_expert_lowers_to_two_triton_kernels(count, kernel):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, wo = samples.sample(book, (4, 96, 64)), samples.sample(book, (4, 64, 96))
    x, expert_index = samples.tokens(wi, count)
    run = functools.partial(packed_mlp, activation="relu")
    program = lowered_for_cuda(run, (wi.packed,), wo.packed, x, expert_index, jnp.ones(count))
    assert kernels(program) == program.count(f'name = "{kernel}"') == 2
