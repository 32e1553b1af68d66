"""The public ops under jax's transformations: shard_map over experts and over tokens, export for CPUs and GPUs."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels as pk
from tests.helpers import packed_samples as samples
from tests.pallas_kernels.test_contract import BACKENDS, OPS, assert_products

TRITON_CALL = "__gpu$xla.gpu.triton"

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(scope="module")
def operands():
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (4, 6, 50))
    return sample, *samples.tokens(sample, 8)


@every_op
@pytest.mark.parametrize("chosen", BACKENDS.values(), ids=BACKENDS)
def test_vmap_over_tokens_and_experts_at_once(op, chosen, operands):
    sample, x, expert_index = operands
    halves = x.reshape(2, 4, -1), expert_index.reshape(2, 4)
    run = jax.vmap(functools.partial(op, **chosen), in_axes=(None, 0, 0))
    found = jax.jit(run)(sample.packed, *halves)
    assert_products(found.reshape(8, -1), sample, x, expert_index)


@every_op
def test_inside_scan_and_cond(op, operands):
    sample, x, expert_index = operands

    def step(carry, token):
        there = functools.partial(op, sample.packed, token[0][None], token[1][None])
        return carry + 1, jax.lax.cond(carry >= 0, there, lambda: jnp.zeros((1, 6)))

    _, found = jax.jit(lambda *tokens: jax.lax.scan(step, 0, tokens))(x, expert_index)
    assert_products(found[:, 0], sample, x, expert_index)


@every_op
def test_exported_for_a_cpu_it_runs_the_reference(op, operands):
    sample, x, expert_index = operands
    run = jax.jit(functools.partial(op, backend="reference"))
    exported = exchanged(export.export(run, platforms=["cpu"])(sample.packed, x, expert_index))
    assert_products(exported.call(sample.packed, x, expert_index), sample, x, expert_index)


@every_op
def test_exported_for_a_gpu_it_holds_the_kernel(op, operands):
    sample, x, expert_index = operands
    h100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    allowed = [export.DisabledSafetyCheck.custom_call(TRITON_CALL)]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        exporting = export.export(jax.jit(op), platforms=["cuda"], disabled_checks=allowed)
        exported = exchanged(exporting(sample.packed, x, expert_index))
    assert exported.platforms == ("cuda",)
    assert f"@{TRITON_CALL}" in exported.mlir_module()
    with pytest.raises(ValueError, match=r"exported for platforms.*cuda.*used on.*cpu"):
        exported.call(sample.packed, x, expert_index)


@every_op
def test_the_cpu_kernels_belong_to_their_process_and_are_not_exported(op, operands):
    sample, x, expert_index = operands
    with pytest.raises(ValueError, match="custom calls whose targets have no compatibility guarantees"):
        export.export(jax.jit(functools.partial(op, backend="cpu")))(sample.packed, x, expert_index)


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
from tests.helpers import packed_samples as samples
import pallas_kernels as pk

mesh = Mesh(np.array(jax.devices()), ("shard",))
sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (4, 6, 50))
x, expert_index = samples.tokens(sample, 8)
by_expert = jax.tree.map(lambda array: P("shard") if array.ndim > 1 and array.shape[0] == 4 else P(), sample.packed)

def one_shard(op, packed, x, expert_index):
    first = jax.lax.axis_index("shard") * packed.num_experts
    mine = (expert_index >= first) & (expert_index < first + packed.num_experts)
    y = op(packed, x, expert_index - first)
    return jax.lax.psum(jnp.where(mine[:, None], y, 0), "shard")

for name, op in (("matvec", pk.packed_matvec), ("matmul", pk.packed_matmul)):
    wanted = op(sample.packed, x, expert_index, backend="reference")
    for backend in ({"backend": "cpu"}, {"backend": "reference"}, {"backend": "pallas", "interpret": True}):
        run = functools.partial(op, **backend)
        shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        experts = shard(functools.partial(one_shard, run), in_specs=(by_expert, P(), P()), out_specs=P())
        tokens = shard(run, in_specs=(P(), P("shard"), P("shard")), out_specs=P("shard"))
        for axis, sharded in (("experts", experts), ("tokens", tokens)):
            found = jax.jit(sharded)(sample.packed, x, expert_index)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=f"{name} {backend} {axis}")
            print(name, backend["backend"], axis)
"""


@pytest.fixture(scope="module")
def sharded() -> list[str]:
    """What ran on four devices, each line after its outputs were compared."""
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


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", ["experts", "tokens"])
def test_shard_map(sharded, op, backend, axis):
    assert f"{op.__name__.removeprefix('packed_')} {backend} {axis}" in sharded
