"""Compiles every GPU kernel with XLA's own compiler on a machine without a GPU, and counts what it made.

    python benchmarks/gpu_compile.py --json benchmarks/results/h100-compile.json \
        --markdown benchmarks/results/h100-compile.md

Under a minute. Registers, spilled bytes, shared memory and the instructions of the loop over codewords, read from the
machine code itself, for an H100 (sm_90) and an A100 (sm_80), at the expert shapes of Switch base-128 and c-2048.
Nothing is timed: instructions are a count, not a speed.
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
# Warp instructions of the loop for so many weights: upstream's CUDA kernel (compiled by nvrtc 12.8 for sm_90).
UPSTREAM = {"kernel": "upstream's CUDA matvec, sm_90", "per_1000_weights": round(1000 * 576 / 694)}


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
    """Every op, on every codebook and GPU: both dtypes at the larger shape, bfloat16 at the smaller one."""
    ops = (("matvec", 1), ("matmul", 256), ("decode", 0), ("mlp", 1), ("mlp", 256))
    runs = [("pallas", *op) for op in ops]
    if jax_triton_refusal() is None:
        runs += [("jax_triton", *op) for op in ops[:2]]
    for gpu in deviceless.GPUS:
        for codebook in codebooks():
            for shape, dtype in (("c-2048", "bfloat16"), ("c-2048", "float32"), ("base-128", "bfloat16")):
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

    with deviceless.absent(deviceless.GPUS["sm_90"]):
        return backend.refusal("matvec", "jax_triton")


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
        "matvec": (pk.packed_matvec, (wi, x, index)),
        "matmul": (pk.packed_matmul, (wi, x, index)),
        "decode": (functools.partial(pk.unpack, dtype=jnp.dtype(case.dtype)), (wi,)),
        "mlp": (pk.packed_mlp, (wi, wo, x, index)),
    }[case.op]
    return functools.partial(function, backend=case.backend), arguments


def compiled(case: Case) -> dict[str, Any]:
    """The case, with the kernels of this repository in it (XLA's own are left out)."""
    function, arguments = program(case)
    launches = deviceless.launches(function, arguments, deviceless.GPUS[case.gpu])
    ours = [launch for launch in launches if launch.kernel.name.startswith("packed_")]
    return dataclasses.asdict(case) | {"kernels": [describe(launch) for launch in ours]}


def describe(launch: deviceless.Launch) -> dict[str, Any]:
    """A kernel for the table."""
    return dataclasses.asdict(launch.kernel) | {
        "threads": launch.threads,
        "shared_bytes": launch.kernel.shared_bytes + (launch.shared_bytes or 0),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as text."""
    columns = (
        "gpu",
        "op",
        "backend",
        "codebook",
        "shape",
        "dtype",
        "tokens",
        "kernel",
        "threads",
        "registers",
    )
    columns += ("stack_bytes", "shared_bytes", "instructions", "loop", "per_1000_weights")
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        for kernel in row["kernels"]:
            cells = row | kernel | {"kernel": kernel["name"], "loop": max(kernel["loops"], default="")}
            lines.append("| " + " | ".join(str(cells.get(column, "")) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def run() -> dict[str, Any]:
    """Every case compiled."""
    return {"rows": [compiled(case) for case in cases()], "jax_triton": jax_triton_refusal()}


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
