"""Compiles every GPU kernel with XLA's own compiler on a machine without a GPU, and counts what it made.

    python benchmarks/gpu_compile.py --json benchmarks/results/h100-compile.json \
        --markdown benchmarks/results/h100-compile.md

Half a minute. Registers, the stack that spilled ones go to, shared memory and the instructions of the loop over
codewords, read from the machine code itself, for an H100 (sm_90) and an A100 (sm_80), at the expert shapes of Switch
base-128 and c-2048. "per 1000": a warp's instructions for 1,000 weights of one token (of no token, where weights are
decoded). Nothing is timed: instructions are a count, not a speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import deviceless
import measuring

EXPERTS = 8
SHAPES = {"base-128": (768, 3072), "c-2048": (2080, 6144)}  # d_model, d_ff
P_ZERO = 0.885
# Warp instructions of the loop, and the weights that they are for, compiled for sm_90 too: beside ours.
KNOWN = {"upstream's CUDA matvec": (576, 694), "the first prototype of ours": (67, 694)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on matrices of one shape under one codebook; `tokens` of them where it takes tokens."""

    gpu: str
    op: str
    backend: str
    codebook: str
    shape: str
    dtype: str
    tokens: int = 0


def cases() -> Iterator[Case]:
    """Every op with one token, few an expert and many, on every GPU.

    Each codebook in bfloat16 at both shapes; float32 with the smaller table at the larger shape.
    """
    ops = (("matmul", 1), ("matmul", 128), ("unpack", 0), ("matmul", 1024), ("mlp", 1), ("mlp", 1024))
    runs = [("pallas", *op) for op in ops]
    if jax_triton_refusal() is None:
        runs += [("jax_triton", *op) for op in ops[:2]]
    for gpu in deviceless.GPUS:
        for codebook, shape, dtype in (
            ("tunstall-8", "c-2048", "bfloat16"),
            ("tunstall-8", "c-2048", "float32"),
            ("tunstall-8", "base-128", "bfloat16"),
            ("upstream", "c-2048", "bfloat16"),
            ("upstream", "base-128", "bfloat16"),
        ):
            for backend, op, tokens in runs:
                yield Case(gpu, op, backend, codebook, shape, dtype, tokens)


@functools.cache
def codebooks() -> dict[str, Any]:
    """The codebooks by name."""
    from qmoe_jax.coding import tunstall_codebook, upstream_codebook

    return {"tunstall-8": tunstall_codebook(), "upstream": upstream_codebook()}


@functools.cache
def weights_per_codeword(codebook: str) -> float:
    """Columns that a codeword stands for, on random digits of the usual density."""
    import numpy as np

    from qmoe_jax.coding import encode

    rng = np.random.default_rng(0)
    digits = (rng.random((64, 6144)) >= P_ZERO) * rng.integers(1, 3, (64, 6144))
    return digits.size / len(encode(digits.astype(np.uint8), codebooks()[codebook]).codes)


def jax_triton_refusal() -> str | None:
    """Why jax-triton cannot compile for a GPU that is not here, or None."""
    from pallas_kernels import backend
    from pallas_kernels.matmul.op import OP

    with deviceless.absent(deviceless.GPUS["sm_90"]):
        return backend.refusal(OP, "jax_triton")


def packed(codebook: str, rows: int, width: int, levels: str = "bfloat16") -> Any:
    """The shapes of packed experts."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import DecodeTable, PackedMatrix

    table = codebooks()[codebook].decode_table
    array = jax.ShapeDtypeStruct
    entries = array(table.entries.shape, jnp.uint32)
    codes = jnp.uint8 if len(table.entries) <= 256 else jnp.uint16
    return PackedMatrix(
        array((EXPERTS, int(rows * width / weights_per_codeword(codebook))), codes),
        array((EXPERTS, rows + 1), jnp.int32),
        array((EXPERTS, rows, 2), levels),
        DecodeTable(entries, table.field_bits, table.slots, table.max_length),
        width,
    )


def program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(the function, the shapes of its arguments)."""
    import jax
    import jax.numpy as jnp

    import pallas_kernels as pk

    d_model, d_ff = SHAPES[case.shape]
    wi = packed(case.codebook, d_ff, d_model, levels=case.dtype)
    wo = packed(case.codebook, d_model, d_ff, levels=case.dtype)
    x = jax.ShapeDtypeStruct((case.tokens, d_model), case.dtype)
    index = jax.ShapeDtypeStruct((case.tokens,), jnp.int32)
    function, arguments = {
        "matmul": (pk.packed_matmul, (wi, x, index)),
        "unpack": (functools.partial(pk.unpack, dtype=jnp.dtype(case.dtype)), (wi,)),
        "mlp": (pk.packed_mlp, (wi, wo, x, index)),
    }[case.op]
    return functools.partial(function, backend=case.backend), arguments


def weights_per_pass(case: Case, kernel: str) -> float | None:
    """Weights times tokens that a warp is done with after a pass of its loop; None for tensor cores' many loops."""
    from pallas_kernels.matmul.pallas import gather, separate
    from pallas_kernels.unpack import pallas as unpack

    configs = {
        "packed_matmul_separate": separate.Config,
        "packed_matmul_gather": gather.Config,
        "unpack": unpack.Config,
    }
    if (config := configs.get(kernel.split("__", 1)[0])) is None:
        return None
    tile = jax_triton_tile(config.kind) if case.backend == "jax_triton" else pallas_tile(case, config)
    return tile * weights_per_codeword(case.codebook)


def pallas_tile(case: Case, kind: Any) -> float:
    """Codewords times tokens of a warp's pass, as the kernels are launched on this GPU."""
    from pallas_kernels import tuning

    d_model, d_ff = SHAPES[case.shape]
    problem = tuning.Problem.of(kind.kind, packed(case.codebook, d_ff, d_model), case.dtype, case.tokens)
    with deviceless.absent(deviceless.GPUS[case.gpu]):
        config = tuning.choose(kind, problem)
    return config.tile * getattr(config, "rows", 1) * getattr(config, "lanes", 1) / config.warps


def jax_triton_tile(route: str) -> int:
    """The same for one warp."""
    from pallas_kernels.matmul import jax_triton

    return jax_triton.SEPARATE_TILE if route == "separate" else jax_triton.GATHER_TILE * jax_triton.LANES


def compiled(case: Case) -> dict[str, Any]:
    """The case, with the kernels of this repository in it (XLA's own are left out)."""
    function, arguments = program(case)
    launches = deviceless.launches(function, arguments, deviceless.GPUS[case.gpu])
    ours = [launch for launch in launches if launch.kernel.name.startswith(("packed_", "unpack"))]
    kernels = []
    for launch in ours:
        kernel = describe(launch)
        if (weights := weights_per_pass(case, launch.kernel.name)) and launch.kernel.loops:
            kernel["per_1000_weights"] = round(1000 * max(launch.kernel.loops) / weights)
        kernels.append(kernel)
    return dataclasses.asdict(case) | {"kernels": kernels}


def describe(launch: deviceless.Launch) -> dict[str, Any]:
    """A kernel for the table."""
    return dataclasses.asdict(launch.kernel) | {
        "threads": launch.threads,
        "shared_bytes": launch.kernel.shared_bytes + (launch.shared_bytes or 0),
    }


HEADINGS = {
    "gpu": "GPU",
    "op": "op",
    "tokens": "tokens",
    "backend": "backend",
    "codebook": "codebook",
    "shape": "shape",
    "dtype": "dtype",
    "name": "kernel",
    "threads": "threads",
    "registers": "registers",
    "stack_bytes": "stack, bytes",
    "shared_bytes": "shared memory, bytes",
    "loop": "instructions of the loop",
    "per_1000_weights": "per 1000",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as text: a line for each kernel."""
    lines = [" | ".join(HEADINGS.values()), " | ".join(["---"] * len(HEADINGS))]
    for row in rows:
        for kernel in row["kernels"]:
            cells = row | kernel | {"loop": max(kernel["loops"], default="")}
            lines.append(
                " | ".join("" if (cell := cells.get(key)) is None else str(cell) for key in HEADINGS)
            )
    known = [f"{name}: {1000 * count / weights:.0f} per 1000" for name, (count, weights) in KNOWN.items()]
    return (
        "\n".join(f"| {line} |" for line in lines)
        + f"\n\nFor comparison, by the same count: {'; '.join(known)}.\n"
    )


def run() -> dict[str, Any]:
    """Every case compiled."""
    import jax

    return {
        "jax": jax.__version__,
        "jax_triton": jax_triton_refusal() or "compiled",
        "known": {name: round(1000 * count / weights) for name, (count, weights) in KNOWN.items()},
        "rows": [compiled(case) for case in cases()],
    }


def enter() -> None:
    """Starts this process again where the compiler's plugin can be found, if it is not such a process."""
    if reason := deviceless.refusal():
        raise SystemExit(reason)
    if str(deviceless.plugin_folder()) not in sys.path:
        os.execve(sys.executable, [sys.executable, *sys.argv], deviceless.environment())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", help="write the table here")
    parser.add_argument("--markdown", help="and here, as text")
    arguments = parser.parse_args()
    enter()
    result = run()
    table = markdown(result["rows"])
    print(table)
    measuring.write_json(arguments.json, result)
    if arguments.markdown:
        pathlib.Path(arguments.markdown).write_text(table)


if __name__ == "__main__":
    main()
