"""Packed products on a CPU beside dense ones, in one run.

    python benchmarks/cpu_kernels.py --threads 2 --shapes 2080x6144 6144x2080 --json benchmarks/results/cpu_kernels.json

Some minutes a shape. Each line is one shape (out x in) and number of tokens an expert; experts rotate, so that caches
are cold. Contenders: our byte Tunstall codewords and upstream's dictionary through the same kernel, dense float32 in
XLA and in NumPy's BLAS, dense bfloat16 in XLA (for few tokens: it takes seconds). Ratios are over the better dense
float32; "limit" is the time that the codewords alone take at the measured memory bandwidth. Every product is checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measuring
import numpy as np

UPSTREAM_SHAPES = ("768x3072", "3072x768", "1024x4096", "4096x1024", "2080x6144", "6144x2080")
P_ZERO = 0.885
PACKED_EXPERTS, DENSE_EXPERTS = 32, 4  # each beyond a 32 MB cache at c-2048 shapes
BFLOAT16_TOKENS = 8


def expert(rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(digits, levels, dense float32) of a random expert."""
    rng = np.random.default_rng(0)
    digits = ((rng.random((rows, width)) >= P_ZERO) * rng.integers(1, 3, (rows, width))).astype(np.uint8)
    levels = np.stack([-rng.random(rows), rng.random(rows)], -1).astype(np.float32)
    table = np.concatenate([np.zeros((rows, 1), np.float32), levels], -1)
    return digits, levels, np.take_along_axis(table, digits.astype(np.int64), 1)


def packed_contenders(digits: np.ndarray, levels: np.ndarray) -> dict[str, Any]:
    """name -> packed experts on the device, all alike but each in its own memory."""
    import jax

    from qmoe_jax.coding import encode, pack, tunstall_codebook, upstream_codebook

    books = {"tunstall-8": tunstall_codebook(P_ZERO), "upstream": upstream_codebook()}
    many = np.broadcast_to(levels, (PACKED_EXPERTS, *levels.shape))
    return {
        name: jax.device_put(pack([encode(digits, book)] * PACKED_EXPERTS, many, book, digits.shape[1]))
        for name, book in books.items()
    }


def runners(packed: dict[str, Any], dense: np.ndarray, tokens: int) -> dict[str, Callable[[int], Any]]:
    """name -> a product of `tokens` tokens with the next expert."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import packed_matmul, packed_matvec

    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, dense.shape[1])), jnp.float32)
    wanted = np.asarray(x) @ dense.T
    index = [jnp.full(tokens, e, jnp.int32) for e in range(PACKED_EXPERTS)]
    op = packed_matvec if tokens == 1 else packed_matmul
    product = jax.jit(lambda x, w: x @ w.T)
    float32 = [jnp.array(dense) for _ in range(DENSE_EXPERTS)]
    in_numpy = [np.array(dense) for _ in range(DENSE_EXPERTS)]
    x_numpy = np.asarray(x)
    found = {
        name: (lambda i, p=p: op(p, x, index[i % PACKED_EXPERTS]).block_until_ready())
        for name, p in packed.items()
    }
    found["XLA float32"] = lambda i: product(x, float32[i % DENSE_EXPERTS]).block_until_ready()
    found["NumPy float32"] = lambda i: x_numpy @ in_numpy[i % DENSE_EXPERTS].T
    for name, run in found.items():
        error = np.abs(np.asarray(run(0)) - wanted).max() / np.abs(wanted).max()
        assert error < 1e-5, f"{name}: {error}"
    if tokens <= BFLOAT16_TOKENS:
        bfloat16 = [jnp.asarray(dense, jnp.bfloat16) for _ in range(DENSE_EXPERTS)]
        x_bfloat16 = x.astype(jnp.bfloat16)
        found["XLA bfloat16"] = lambda i: product(x_bfloat16, bfloat16[i % DENSE_EXPERTS]).block_until_ready()
    return found


def bandwidth() -> float:
    """Bytes a second that a large array is read with."""
    array = np.ones(1 << 26, np.float32)
    seconds = measuring.best_seconds({"read": lambda i: array.sum()}, 5)["read"]
    return array.nbytes / seconds


def measure(shape: str, tokens: list[int], rounds: int, bytes_a_second: float) -> list[dict[str, Any]]:
    rows, width = map(int, shape.split("x"))
    digits, levels, dense = expert(rows, width)
    packed = packed_contenders(digits, levels)
    codes = packed["tunstall-8"].row_offsets[0, -1].item()
    table = []
    for count in tokens:
        seconds = measuring.best_seconds(
            runners(packed, dense, count), rounds if count < 64 else max(3, rounds // 4)
        )
        dense_best = min(seconds["XLA float32"], seconds["NumPy float32"])
        row = {
            "shape": shape,
            "tokens": count,
            "milliseconds": {k: round(1e3 * v, 3) for k, v in seconds.items()},
        }
        row["billion_weights_a_second"] = round(dense.size * count / seconds["tunstall-8"] / 1e9, 1)
        row["over_dense_float32"] = round(dense_best / seconds["tunstall-8"], 2)
        if "XLA bfloat16" in seconds:
            row["over_dense_bfloat16"] = round(seconds["XLA bfloat16"] / seconds["tunstall-8"], 1)
        row["over_upstream_dictionary"] = round(seconds["upstream"] / seconds["tunstall-8"], 2)
        row["limit_milliseconds"] = round(1e3 * codes / bytes_a_second, 3)
        table.append(row)
        print_row(row)
    return table


def print_row(row: dict[str, Any]) -> None:
    times = "  ".join(f"{name} {value:.2f}" for name, value in row["milliseconds"].items())
    print(
        f"{row['shape']:>10} {row['tokens']:4d} tokens  {row['over_dense_float32']:5.2f} x dense float32  "
        f"{row['billion_weights_a_second']:6.1f} G weights/s  (ms: {times})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=list(UPSTREAM_SHAPES), help="out x in")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**i for i in range(10)])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--note", default="", help="kept with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    measuring.use_threads(options.threads)
    result = {"machine": measuring.machine(options.threads), "note": options.note}
    bytes_a_second = bandwidth()
    result["gigabytes_a_second"] = round(bytes_a_second / 1e9, 1)
    print(f"{result['gigabytes_a_second']} GB/s read by one thread")
    result["products"] = []
    for shape in options.shapes:
        result["products"] += measure(shape, options.tokens, options.rounds, bytes_a_second)
    measuring.write_json(options.json, result)


if __name__ == "__main__":
    main()
