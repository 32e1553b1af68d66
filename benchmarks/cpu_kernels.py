"""Compares packed products on a CPU with dense ones, in one run.

    for shape in 2080x6144 6144x2080; do python -m benchmarks.cpu_kernels --threads 2 --shapes $shape --json
        benchmarks/results/cpu_kernels.json
    done

Takes a minute or two per shape. New shapes and numbers of threads are added to an existing file, and those
measured again are replaced. Prints one line per shape (out x in) and number of tokens per expert: the
speed-up over the fastest dense float32 product and the milliseconds of every contender. Experts rotate, so
that caches are cold. Contenders: Tunstall codewords of 8, 10 and 12 bits and upstream's dictionary through
the same kernel; dense float32 in XLA with weights [out, in] and [in, out], and in NumPy's BLAS; dense
bfloat16 in XLA, both layouts, for few tokens. Every product is checked. The limit is the time to read the
codewords alone at the memory bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measuring
from benchmarks.samples import P_ZERO, random_ternary

UPSTREAM_SHAPES = ("768x3072", "3072x768", "1024x4096", "4096x1024", "2080x6144", "6144x2080")
OURS, BLAS = "tunstall-8", "NumPy float32"
PACKED_BYTES, DENSE_BYTES = 48e6, 100e6  # of all copies of a matrix: more than a cache of 32 MB holds
BFLOAT16_TOKENS = 4
PAUSE = 0.02  # seconds
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}

Run = Callable[[int], Any]


def packed_experts(digits: np.ndarray, levels: np.ndarray) -> dict[str, Any]:
    """Return packed experts on the device by codebook, equal but each in memory of its own."""
    import jax

    from qmoe_jax.coding import encode, pack, tunstall_codebook, upstream_codebook

    books = {f"tunstall-{bits}": tunstall_codebook(P_ZERO, code_bits=bits) for bits in (8, 10, 12)}
    packed = {}
    for name, book in (books | {"upstream": upstream_codebook()}).items():
        stream = encode(digits, book)
        copies = int(PACKED_BYTES // stream.codes.nbytes) + 1
        many = np.broadcast_to(levels, (copies, *levels.shape))
        packed[name] = jax.device_put(pack([stream] * copies, many, book, digits.shape[1]))
    return packed


def packed_runs(packed: dict[str, Any], x: Any) -> dict[str, Run]:
    """Return the product with the next expert by codebook."""
    import jax.numpy as jnp

    from pallas_kernels import packed_matmul

    def run(matrices: Any) -> Run:
        index = [jnp.full(len(x), e, jnp.int32) for e in range(matrices.num_experts)]
        return lambda i: packed_matmul(matrices, x, index[i % len(index)]).block_until_ready()

    return {name: run(matrices) for name, matrices in packed.items()}


def dense_runs(dense: np.ndarray, x: Any) -> dict[str, Run]:
    """Return the same for the dense contenders; each has its own copies of the matrix."""
    import jax
    import jax.numpy as jnp

    layouts = {"[out, in]": (dense, jax.jit(lambda x, w: x @ w.T)), "[in, out]": (dense.T, jax.jit(jnp.dot))}

    def run(product: Any, x: Any, weights: np.ndarray) -> Run:
        copies = [jnp.array(weights, x.dtype) for _ in range(int(DENSE_BYTES // weights.nbytes) + 1)]
        return lambda i: product(x, copies[i % len(copies)]).block_until_ready()

    runs = {}
    for dtype in ("float32", "bfloat16") if len(x) <= BFLOAT16_TOKENS else ("float32",):
        for layout, (weights, product) in layouts.items():
            runs[f"XLA {dtype} {layout}"] = run(product, x.astype(dtype), weights)
    copies = [np.array(dense) for _ in range(int(DENSE_BYTES // dense.nbytes) + 1)]
    in_numpy = np.asarray(x)
    runs[BLAS] = lambda i: in_numpy @ copies[i % len(copies)].T
    return runs


def check(runs: dict[str, Run], wanted: np.ndarray) -> None:
    for name, run in runs.items():
        error = np.abs(np.asarray(run(0), np.float32) - wanted).max() / np.abs(wanted).max()
        tolerance = TOLERANCES["bfloat16" if "bfloat16" in name else "float32"]
        assert error < tolerance, f"{name}: expected a relative error below {tolerance}, found {error}"


def best_of_bursts(runs: dict[str, Run], turns: int, length: int) -> dict[str, float]:
    """Return the shortest seconds of each.

    A turn is a pause, in which the threads of the previous contender fall asleep, and a burst of runs, whose
    first quarter only wakes this contender's threads.
    """
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(turns):
        for name, run in runs.items():
            time.sleep(PAUSE)
            for i in range(length):
                start = time.perf_counter()
                run(length * turn + i)
                if 4 * i >= length:
                    best[name] = min(best[name], time.perf_counter() - start)
    return best


def bandwidth(threads: int) -> float:
    """Return the bytes per second that this many threads read from memory."""
    import numba

    from pallas_kernels.cpu.threads import next_chunk, parallel_for

    @numba.njit(nogil=True, fastmath=True)
    def read(counter, array, sums):
        piece = next_chunk(counter)
        while piece < len(sums):
            sums[piece] = array[piece].sum()
            piece = next_chunk(counter)

    array, sums = np.ones((1 << 10, 1 << 16), np.float32), np.zeros(1 << 10, np.float32)
    return array.nbytes / best_of_bursts({"read": lambda i: parallel_for(read, array, sums)}, 3, 4)["read"]


def streams(packed: Any, weights: int, bytes_per_second: float) -> dict[str, float]:
    """Return what bounds a product with one token: memory traffic and loads, three per cycle and core."""
    codewords, size = packed.row_offsets[0, -1].item(), packed.codes.dtype.itemsize
    return {
        "bits_per_weight": round(8 * codewords * size / weights, 3),
        "bits_per_weight_unpadded": round(codewords * np.log2(packed.table.entries.shape[0]) / weights, 3),
        "limit_milliseconds": round(1e3 * codewords * size / bytes_per_second, 3),
        "loads_per_codeword": 1 + packed.table.words * (1 + packed.table.slots),
        "million_codewords": round(codewords / 1e6, 3),
    }


def measure(
    packed: dict[str, Any], dense: np.ndarray, tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    import jax.numpy as jnp

    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, dense.shape[1])), jnp.float32)
    runs = packed_runs(packed, x) | dense_runs(dense, x)
    check(runs, np.asarray(x) @ dense.T)
    turns, length = (options.turns, 12) if tokens < 64 else (max(2, options.turns // 2), 4)
    last = {BLAS: runs.pop(BLAS)}  # its threads spin for a tenth of a second
    seconds = best_of_bursts(runs, turns, length) | best_of_bursts(last, turns, length)
    row: dict[str, Any] = {
        "tokens": tokens,
        "milliseconds": {k: round(1e3 * v, 3) for k, v in seconds.items()},
        "billion_weights_per_second": round(dense.size * tokens / seconds[OURS] / 1e9, 1),
    }
    for dtype in ("float32", "bfloat16"):
        if found := [v for name, v in seconds.items() if dtype in name]:
            row[f"speedup_over_dense_{dtype}"] = round(min(found) / seconds[OURS], 2)
    return row


def measure_shape(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    rows, width = map(int, shape.split("x"))
    digits, levels, weights = random_ternary(rows, width)
    packed, dense = packed_experts(digits, levels.astype(np.float32)), weights.astype(np.float32)
    load, bytes_per_second = round(os.getloadavg()[0], 1), bandwidth(options.threads)
    result: dict[str, Any] = {
        "shape": shape,
        "threads": options.threads,
        "load_before": load,
        "note": options.note,
        "gigabytes_per_second": round(bytes_per_second / 1e9, 1),
        "streams": {name: streams(p, dense.size, bytes_per_second) for name, p in packed.items()},
        "products": [],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "products"}))
    for tokens in options.tokens:
        result["products"].append(measure(packed, dense, tokens, options))
        print_row(shape, result["products"][-1])
    return result


def print_row(shape: str, row: dict[str, Any]) -> None:
    times = "  ".join(f"{name} {value:.2f}" for name, value in row["milliseconds"].items())
    print(
        f"{shape:>10} {row['tokens']:4d} tokens  {row['speedup_over_dense_float32']:5.2f} x  (ms: {times})",
        flush=True,
    )


def add_to(path: str | None, machine: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Write the runs into the file, and keep its runs of other shapes and numbers of threads."""
    old = json.loads(pathlib.Path(path).read_text())["runs"] if path and pathlib.Path(path).exists() else []
    new = {(run["shape"], run["threads"]): run for run in [*old, *runs]}
    order = sorted(new, key=lambda key: (key[1], UPSTREAM_SHAPES.index(key[0])))
    measuring.write_json(path, {"machine": machine, "runs": [new[key] for key in order]})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--shapes", nargs="+", default=UPSTREAM_SHAPES, choices=UPSTREAM_SHAPES, help="out x in"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**i for i in range(10)])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--note", default="", help="stored with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write, or to add to")
    options = parser.parse_args()
    measuring.use_threads(options.threads)
    machine = measuring.machine(options.threads)
    del machine["threads"], machine["load_before"]  # each run has its own
    add_to(options.json, machine, [measure_shape(shape, options) for shape in options.shapes])


if __name__ == "__main__":
    main()
