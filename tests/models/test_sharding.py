"""Logical axes shard a model over a mesh: experts on one axis, the batch on the other, logits unchanged."""

import os
import subprocess
import sys

PROGRAM = """
import jax, numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qmoe_jax import SwitchConfig
from qmoe_jax.models import SwitchTransformer

config = SwitchConfig(d_model=16, d_ff=32, d_kv=4, num_heads=2, num_encoder_layers=2, num_decoder_layers=1,
    num_experts=4, encoder_sparse_layers=(1,), decoder_sparse_layers=(0,), vocab_size=32, tied=False)
model, tokens = SwitchTransformer(config), np.random.default_rng(0).integers(1, 32, (4, 8))
boxed = jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"]
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
rules = (("expert", "model"), ("batch", "data"))
shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
params = nn.meta.unbox(boxed)
expected = jax.jit(model.apply)({"params": params}, tokens, tokens)
sharded = jax.device_put(params, shardings)
kernel = sharded["encoder"]["layers_1"]["mlp"]["expert"]["wi"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (2, 16, 32), kernel.sharding
batch = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
found = jax.jit(model.apply)({"params": sharded}, batch, batch)
np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
print("equal")
"""


def test_experts_and_batch_spread_over_four_devices():
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
