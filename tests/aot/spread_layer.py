"""Compiles a layer spread over eight absent H100s, and prints JSON: its kernels and exchanges.

`compiler.run_module` starts it in a process of its own.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qmoe_jax.distributed import device_mesh, split
from qmoe_jax.inference.placement import ShardedExperts
from qmoe_jax.inference.placement.sharded import partition
from tests.aot import cases, compiler

DEVICES = 8
EMBED, MLP = cases.SHAPES["base-128"]
LOADS = {"generation": 8 * DEVICES, "prompts": 512 * DEVICES}
"""Tokens of the whole batch."""


def main() -> None:
    gpu = compiler.GPUS["sm_90"]
    mesh = device_mesh(compiler.devices(gpu, DEVICES))
    wi, wo = (cases.packed_shapes("tunstall-8", *shape) for shape in ((MLP, EMBED), (EMBED, MLP)))

    def spread(part: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        experts = (DEVICES * (cases.EXPERTS + 1),) if spec else part.shape[:1]  # and an empty one
        return jax.ShapeDtypeStruct(
            (*experts, *part.shape[1:]), part.dtype, sharding=NamedSharding(mesh, spec)
        )

    wi, wo = jax.tree.map(spread, (wi, wo), partition((wi, wo)))
    layer = ShardedExperts((wi,), wo, mesh, "relu")
    apply = jax.jit(lambda layer, *tokens: layer(*tokens, num_experts=DEVICES * cases.EXPERTS))
    found = {}
    for load, tokens in LOADS.items():
        rows = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=split(mesh))
        with compiler.absent(gpu):
            lowered = apply.lower(
                layer,
                rows(tokens, EMBED, dtype=jnp.bfloat16),
                rows(tokens, dtype=jnp.int32),
                rows(tokens, dtype=jnp.float32),
            )
        compiled = lowered.compile(compiler_options=compiler.OPTIONS)
        text = compiled.as_text()
        found[load] = {
            "kernels": sorted(set(re.findall(r"packed_matmul_[a-z]+", text))),
            "exchanges": len(re.findall(r" all-to-all(?:-start)?\(", text)),
            "gathers": len(re.findall(r" all-gather(?:-start)?\(", text)),
            "agreements": len(re.findall(r" all-reduce(?:-start)?\(", text)),
            "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
            "whole_bytes": int(sum(np.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(layer))),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
