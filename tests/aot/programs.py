"""Compiles for absent GPUs and prints JSON; `compiler.run_module` starts it in a process of its own.

Instructions are counted for the cases named on the command line, `GPU/CODEBOOK/SHAPE/DTYPE` (or `all`).

The cases; the whole model; the kernels of compression; and two kernels that must be found wanting, which
shows that the checks on the others can fail.
"""

import json
import sys

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl

import pallas_kernels as pk
from pallas_kernels.backend import triton_parameters
from qmoe_jax import SwitchConfig
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.quantization import ternary_grid
from tests.aot import cases, compiler

H100 = compiler.GPUS["sm_90"]
SMALL = SwitchConfig(
    d_model=256,
    d_ff=512,
    d_kv=64,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=cases.EXPERTS,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(1,),
    vocab_size=512,
)


def product(size: int, precision: str):
    """Return a kernel that holds a whole product of two matrices, and the shapes of its arguments."""

    def kernel(a, out):
        out[...] = jnp.dot(a[...], a[...], precision=precision)

    def run(a):
        shape = jax.ShapeDtypeStruct((size, size), jnp.float32)
        parameters = triton_parameters(num_warps=4)
        return pl.pallas_call(kernel, out_shape=shape, compiler_params=parameters, name="product")(a)

    return run, (jax.ShapeDtypeStruct((size, size), jnp.float32),)


def compile_error(function, shapes) -> str:
    """Return the compiler's message, "" if it compiles."""
    try:
        compiler.compile_kernels(function, shapes, H100)
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return ""


def model() -> dict[str, list[str]]:
    """Return the names of the kernels of the encoder and of a decoder step, with packed experts in both."""
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
        function.__name__: [
            launch.kernel.name for launch in compiler.compile_kernels(function, (params,), H100)
        ]
        for function in (encoder, decoder_step)
    }


def packed_like(kernel: jax.ShapeDtypeStruct):
    """Return packed experts of the shape of dense ones [expert, in, out]."""
    _, width, rows = kernel.shape
    return cases.packed_shapes("tunstall-8", rows, width)


def compression() -> dict[str, list[dict[str, object]]]:
    """Return the kernels that compress experts of c-2048: a block of GPTQ, and rows to codewords."""
    array, (width, rows) = jax.ShapeDtypeStruct, cases.SHAPES["c-2048"]
    columns = array((16, 128, rows), jnp.float32)
    factor = array((16, 128, 128), jnp.float32), array((16, 128), jnp.float32)
    levels, group_index = array((16, 1, rows, 2), jnp.float32), array((128,), jnp.int32)

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
        return pk.encode_rows(digits, cases.CODEBOOKS["tunstall-8"].encode_table, backend="pallas")

    programs = {
        "quantize_block": (block, (columns, columns, *factor, levels, group_index)),
        "encode_rows": (encode, (array((4, rows, width), jnp.uint8),)),
    }
    return {name: described(*program) for name, program in programs.items()}


def described(function, shapes) -> list[dict[str, object]]:
    return [cases.describe_launch(launch) for launch in compiler.compile_kernels(function, shapes, H100)]


def rows(counted: list[str]) -> list[dict[str, object]]:
    """Return every case, with instructions for those in `counted`."""
    names = lambda case: {"all", f"{case.gpu}/{case.codebook}/{case.shape}/{case.dtype}"}
    return [
        cases.describe_case(case, count_instructions=not names(case).isdisjoint(counted))
        for case in cases.cases()
    ]


if __name__ == "__main__":
    found = {
        "jax": jax.__version__,
        "jax_triton": cases.jax_triton_refusal() or "compiled",
        "rows": rows(sys.argv[1:]),
        "spilling": described(*product(64, "highest")),
        "overflowing": compile_error(*product(512, "default")),
        "model": model(),
        "compression": compression(),
    }
    json.dump(found, sys.stdout)
