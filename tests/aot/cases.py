"""Programs compiled for absent GPUs: each op at the expert shapes of Switch base-128 and c-2048."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from benchmarks.samples import random_digits
from pallas_kernels import backend, tuning
from pallas_kernels.matmul.op import OP
from pallas_kernels.matmul.pallas import gather, separate
from pallas_kernels.unpack import pallas as unpack
from qmoe_jax.coding import encode, tunstall_codebook, upstream_codebook
from tests.aot import compiler, cubin

EXPERTS = 8
SHAPES = {"base-128": (768, 3072), "c-2048": (2080, 6144)}  # d_model, d_ff
CONFIGS: dict[str, Any] = {  # the configuration of each kernel with one main loop, by its name
    "packed_matmul_separate": separate.Config,
    "packed_matmul_gather": gather.Config,
    "unpack": unpack.Config,
}
CODEBOOKS = {"tunstall-8": tunstall_codebook(), "upstream": upstream_codebook()}


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on matrices of one shape under one codebook; `tokens` is 0 where the op takes none."""

    gpu: str
    op: str
    backend: str
    codebook: str
    shape: str
    dtype: str
    tokens: int = 0


def cases() -> Iterator[Case]:
    """Yield every op with one token, a few tokens per expert and many, on every GPU.

    Each codebook in bfloat16 at both shapes; float32 with the smaller table at the larger shape.
    """
    ops = (("matmul", 1), ("matmul", 128), ("unpack", 0), ("matmul", 1024), ("mlp", 1), ("mlp", 1024))
    runs = [("pallas", *op) for op in ops]
    if jax_triton_refusal() is None:
        runs += [("jax_triton", *op) for op in ops[:2]]
    for gpu in compiler.GPUS:
        for codebook, shape, dtype in (
            ("tunstall-8", "c-2048", "bfloat16"),
            ("tunstall-8", "c-2048", "float32"),
            ("tunstall-8", "base-128", "bfloat16"),
            ("upstream", "c-2048", "bfloat16"),
            ("upstream", "base-128", "bfloat16"),
        ):
            for backend_name, op, tokens in runs:
                yield Case(gpu, op, backend_name, codebook, shape, dtype, tokens)


def jax_triton_refusal() -> str | None:
    """Return why jax-triton cannot compile for an absent GPU, or None if it can."""
    with compiler.absent(compiler.GPUS["sm_90"]):
        return backend.refusal(OP, "jax_triton")


def packed_shapes(codebook: str, rows: int, width: int, levels: str = "bfloat16") -> pk.PackedMatrix:
    """Return packed experts whose arrays are `jax.ShapeDtypeStruct`."""
    table = CODEBOOKS[codebook].decode_table
    array: Any = jax.ShapeDtypeStruct
    codes = jnp.uint8 if len(table.entries) <= 256 else jnp.uint16
    return pk.PackedMatrix(
        array((EXPERTS, int(rows * width / weights_per_codeword(codebook))), codes),
        array((EXPERTS, rows + 1), jnp.int32),
        array((EXPERTS, rows, 2), levels),
        pk.DecodeTable(
            array(table.entries.shape, jnp.uint32), table.field_bits, table.slots, table.max_length
        ),
        width,
    )


def describe_case(case: Case, *, count_instructions: bool) -> dict[str, Any]:
    """Compile a case and return its fields with `kernels`: this repository's, without XLA's own."""
    launches = compiler.compile_kernels(*_program(case), compiler.GPUS[case.gpu])
    kernels = []
    for launch in launches:
        if launch.kernel.name.startswith(("packed_", "unpack")):
            counts = _instruction_counts(case, launch.kernel) if count_instructions else {}
            kernels.append(describe_launch(launch) | counts)
    return dataclasses.asdict(case) | {"kernels": kernels}


def describe_launch(launch: compiler.Launch) -> dict[str, Any]:
    """Return the resources of a kernel as JSON values; `shared_bytes` is static and dynamic shared memory."""
    kernel = launch.kernel
    return {
        "name": kernel.name,
        "threads": launch.threads,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack_bytes,
        "shared_bytes": kernel.shared_bytes + (launch.shared_bytes or 0),
    }


def _instruction_counts(case: Case, kernel: cubin.Kernel) -> dict[str, Any]:
    """Return the instructions in all, in each loop and, given one main loop, per 1,000 weights of a warp."""
    instructions = cubin.disassemble(kernel)
    loops = list(cubin.find_loops(instructions))
    counts = {"instructions": len(instructions), "loops": loops}
    if (weights := _weights_per_pass(case, kernel.name)) and loops:
        counts["per_1000_weights"] = round(1000 * max(loops) / weights)
    return counts


@functools.cache
def weights_per_codeword(codebook: str) -> float:
    """Return the average number of weights per codeword on random digits of the usual sparsity."""
    digits = random_digits((64, 6144))
    return digits.size / len(encode(digits, CODEBOOKS[codebook]).codes)


def _program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the function and the shapes of its arguments."""
    d_model, d_ff = SHAPES[case.shape]
    wi = packed_shapes(case.codebook, d_ff, d_model, levels=case.dtype)
    wo = packed_shapes(case.codebook, d_model, d_ff, levels=case.dtype)
    x = jax.ShapeDtypeStruct((case.tokens, d_model), case.dtype)
    index = jax.ShapeDtypeStruct((case.tokens,), jnp.int32)
    function, arguments = {
        "matmul": (pk.packed_matmul, (wi, x, index)),
        "unpack": (functools.partial(pk.unpack, dtype=jnp.dtype(case.dtype)), (wi,)),
        "mlp": (pk.packed_mlp, (wi, wo, x, index)),
    }[case.op]
    return functools.partial(function, backend=case.backend), arguments


def _weights_per_pass(case: Case, kernel: str) -> float | None:
    """Return the weights times tokens that a warp processes per iteration of its loop.

    None for the kernels that use tensor cores, which have several loops.
    """
    if (config := CONFIGS.get(kernel.split("__", 1)[0])) is None:
        return None
    tile = _jax_triton_tile(config.kind) if case.backend == "jax_triton" else _pallas_tile(case, config)
    return tile * weights_per_codeword(case.codebook)


def _pallas_tile(case: Case, config: Any) -> float:
    """Return codewords times tokens per iteration of a warp, for the configuration chosen on this GPU."""
    d_model, d_ff = SHAPES[case.shape]
    packed = packed_shapes(case.codebook, d_ff, d_model)
    with compiler.absent(compiler.GPUS[case.gpu]):
        chosen = tuning.choose(config, tuning.Problem.of(config.kind, packed, case.dtype, case.tokens))
    return chosen.tile * getattr(chosen, "rows", 1) * getattr(chosen, "lanes", 1) / chosen.warps


def _jax_triton_tile(route: str) -> int:
    """Return the same for jax-triton's kernels, which have one warp per program."""
    from pallas_kernels.matmul import jax_triton

    return jax_triton.SEPARATE_TILE if route == "separate" else jax_triton.GATHER_TILE * jax_triton.LANES
