"""Compiles for GPUs that are not here, in a process of its own that test_deviceless starts; prints JSON.

The kernels' table, as the benchmark makes it; the whole model; and two kernels that must be found wanting, so that
silence about the others means something.
"""

import json
import sys

import deviceless
import gpu_compile
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl

import pallas_kernels as pk
from pallas_kernels.backend import triton_parameters
from qmoe_jax import SwitchConfig
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.quantization import ternary_grid

H100 = deviceless.GPUS["sm_90"]
SMALL = SwitchConfig(
    d_model=256,
    d_ff=512,
    d_kv=64,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=gpu_compile.EXPERTS,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(1,),
    vocab_size=512,
)


def product(size: int, precision: str):
    """A kernel that holds a whole product of two matrices."""

    def kernel(a, out):
        out[...] = jnp.dot(a[...], a[...], precision=precision)

    def run(a):
        shape = jax.ShapeDtypeStruct((size, size), jnp.float32)
        parameters = triton_parameters(num_warps=4)
        return pl.pallas_call(kernel, out_shape=shape, compiler_params=parameters, name="product")(a)

    return run, (jax.ShapeDtypeStruct((size, size), jnp.float32),)


def refused(function, shapes) -> str:
    """What the compiler says."""
    try:
        deviceless.launches(function, shapes, H100)
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return ""


def model() -> dict[str, list[str]]:
    """The kernels of the encoder and of a step of the decoder, with packed experts in both."""
    transformer, prompt = SwitchTransformer(SMALL, dtype=jnp.bfloat16), jnp.ones((2, 8), jnp.int32)
    boxed = jax.eval_shape(lambda: transformer.init(jax.random.key(0), prompt, prompt)["params"])
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: packed_like(leaf) if "'expert'" in jax.tree_util.keystr(path) else leaf,
        nn.meta.unbox(boxed),
    )
    mask, encoded = jnp.ones(prompt.shape, bool), jnp.ones((*prompt.shape, SMALL.d_model), jnp.bfloat16)

    def encoder(params):
        return transformer.apply({"params": params}, prompt, mask, method="encode")

    def decoder_step(params):
        operands = prompt[:, :1], encoded, mask, jnp.int32(0), 4
        return transformer.apply({"params": params}, *operands, method="decode_step", mutable=["cache"])

    return {
        function.__name__: [launch.kernel.name for launch in deviceless.launches(function, (params,), H100)]
        for function in (encoder, decoder_step)
    }


def compression() -> dict[str, list[dict[str, object]]]:
    """The kernels that compress experts of c-2048: a block of GPTQ, and rows to codewords."""
    array, (width, rows) = jax.ShapeDtypeStruct, gpu_compile.SHAPES["c-2048"]
    columns = array((16, 128, rows), jnp.float32)
    factor = array((16, 128, 128), jnp.float32), array((16, 128), jnp.float32)
    levels, group = array((16, 1, rows, 2), jnp.float32), array((128,), jnp.int32)

    def block(w, error_feedback, lower, curvature, levels, group_index):
        return pk.quantize_block(
            w,
            error_feedback,
            lower,
            curvature,
            levels=levels,
            group_index=group_index,
            grid=ternary_grid(),
            backend="pallas",
        )

    def encode(digits):
        table = gpu_compile.codebooks()["tunstall-8"].encode_table
        return pk.encode_rows(digits, table, backend="pallas")

    programs = {
        "quantize_block": (block, (columns, columns, *factor, levels, group)),
        "encode_rows": (encode, (array((4, rows, width), jnp.uint8),)),
    }
    return {
        name: [gpu_compile.describe(launch) for launch in deviceless.launches(*program, H100)]
        for name, program in programs.items()
    }


def packed_like(kernel: jax.ShapeDtypeStruct):
    """The same experts packed: dense ones are [expert, in, out]."""
    _, width, rows = kernel.shape
    return gpu_compile.packed("tunstall-8", rows, width)


if __name__ == "__main__":
    spilling, overflowing = product(64, "highest"), product(512, "default")
    json.dump(
        gpu_compile.run()
        | {
            "spilling": [gpu_compile.describe(launch) for launch in deviceless.launches(*spilling, H100)],
            "overflowing": refused(*overflowing),
            "model": model(),
            "compression": compression(),
        },
        sys.stdout,
    )
