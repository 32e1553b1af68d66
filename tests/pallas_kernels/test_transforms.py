"""The public product under jax's transformations: vmap, scan, shard_map, export for CPUs and GPUs."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

import pallas_kernels as pk
from tests.helpers import packed_samples as samples
from tests.helpers.kernel_contract import IMPLEMENTATIONS, PALLAS_ROUTES, assert_products, pallas_route
from tests.helpers.lowering import TRITON_CALL, for_an_h100

every_implementation = pytest.mark.parametrize("backend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.fixture(scope="module")
def operands():
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (4, 6, 50))
    return sample, *samples.tokens(sample, 8)


@every_implementation
def test_vmap_over_tokens_and_experts_at_once(backend, operands):
    sample, x, expert_index = operands
    halves = x.reshape(2, 4, -1), expert_index.reshape(2, 4)
    run = jax.vmap(functools.partial(pk.packed_matmul, backend=backend), in_axes=(None, 0, 0))
    found = jax.jit(run)(sample.packed, *halves)
    assert_products(found.reshape(8, -1), sample, x, expert_index)


@every_implementation
def test_a_product_inside_scan_and_cond(backend, operands):
    sample, x, expert_index = operands
    run = functools.partial(pk.packed_matmul, backend=backend)

    def step(carry, token):
        there = functools.partial(run, sample.packed, token[0][None], token[1][None])
        return carry + 1, jax.lax.cond(carry >= 0, there, lambda: jnp.zeros((1, 6)))

    _, found = jax.jit(lambda *tokens: jax.lax.scan(step, 0, tokens))(x, expert_index)
    assert_products(found[:, 0], sample, x, expert_index)


@pytest.mark.parametrize("route", ["reference-separate", "reference-grouped"])
def test_a_reference_exported_for_a_cpu_runs(route, operands):
    sample, x, expert_index = operands
    run = jax.jit(functools.partial(pk.packed_matmul, backend=IMPLEMENTATIONS[route]))
    exported = exchanged(export.export(run, platforms=["cpu"])(sample.packed, x, expert_index))
    assert_products(exported.call(sample.packed, x, expert_index), sample, x, expert_index)


@pytest.mark.parametrize("route", PALLAS_ROUTES)
def test_a_product_exported_for_a_gpu_holds_the_kernel(route, operands):
    sample, x, expert_index = operands
    run = jax.jit(functools.partial(pk.packed_matmul, backend=pallas_route(route)))
    allowed = [export.DisabledSafetyCheck.custom_call(TRITON_CALL)]
    with for_an_h100():
        exporting = export.export(run, platforms=["cuda"], disabled_checks=allowed)
        exported = exchanged(exporting(sample.packed, x, expert_index))
    assert exported.platforms == ("cuda",)
    assert f"@{TRITON_CALL}" in exported.mlir_module()
    with pytest.raises(ValueError, match=r"exported for platforms.*cuda.*used on.*cpu"):
        exported.call(sample.packed, x, expert_index)


def test_the_cpu_kernels_belong_to_their_process_and_are_not_exported(operands):
    sample, x, expert_index = operands
    with pytest.raises(ValueError, match="custom calls whose targets have no compatibility guarantees"):
        export.export(jax.jit(functools.partial(pk.packed_matmul, backend="cpu")))(
            sample.packed, x, expert_index
        )


def exchanged(exported: export.Exported) -> export.Exported:
    """Written and read again where flatbuffers is installed, as jax needs for that."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        return exported
    return export.deserialize(exported.serialize(vjp_order=0))


SHARDED = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import pallas_kernels as pk
from tests.helpers import packed_samples as samples
from tests.helpers.kernel_contract import IMPLEMENTATIONS

mesh = Mesh(np.array(jax.devices()), ("shard",))
sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (4, 6, 50))
x, expert_index = samples.tokens(sample, 8)
spec = lambda array: P("shard") if array.ndim > 1 and array.shape[0] == 4 else P()
by_expert = jax.tree.map(spec, sample.packed)

def one_shard(op, packed, x, expert_index):
    first = jax.lax.axis_index("shard") * packed.num_experts
    mine = (expert_index >= first) & (expert_index < first + packed.num_experts)
    y = op(packed, x, expert_index - first)
    return jax.lax.psum(jnp.where(mine[:, None], y, 0), "shard")

wanted = pk.packed_matmul(sample.packed, x, expert_index, backend="reference")
for name, backend in IMPLEMENTATIONS.items():
    run = functools.partial(pk.packed_matmul, backend=backend)
    shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    experts = shard(functools.partial(one_shard, run), in_specs=(by_expert, P(), P()), out_specs=P())
    tokens = shard(run, in_specs=(P(), P("shard"), P("shard")), out_specs=P("shard"))
    for axis, sharded in (("experts", experts), ("tokens", tokens)):
        found = jax.jit(sharded)(sample.packed, x, expert_index)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=f"{name} {axis}")
        print(name, axis)
"""


@pytest.fixture(scope="module")
def sharded() -> list[str]:
    """Return the lines of a program on four devices: each names a run whose outputs it has compared."""
    folders = (pathlib.Path(pk.__file__).parent.parent, pathlib.Path(__file__).parent)
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis", ["experts", "tokens"])
def test_products_under_shard_map(sharded, name, axis):
    assert f"{name} {axis}" in sharded
