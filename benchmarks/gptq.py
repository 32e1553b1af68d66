"""Measures how many experts per second GPTQ quantizes to ternary.

    python -m benchmarks.gptq --json benchmarks/results/gptq.json

Takes a minute and a half on two cores. Prints for both matrices of an expert: experts per second of `gptq` on
several experts at once; the share of factoring the Hessians; the ratio to the same arithmetic at the speed of
this machine's float32 matrix product, an upper bound; and the reference implementation in NumPy, which
quantizes one column of one expert at a time. Digits are compared with the reference's, which factors in
float64: a weight near a rounding border may fall on its other side, and the rest of its row compensates for
that. The last line projects the hours for all experts of Switch-c-2048 from the speeds at c-2048, if nothing
else had to be done.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from benchmarks import measuring

# d_model, d_ff, experts at once, calibration tokens per expert
SIZES = {"demo": (240, 960, 8, 600), "base-128": (768, 3072, 2, 1500), "c-2048": (2080, 6144, 2, 1500)}
C2048_EXPERTS = 30 * 2048


def problem(experts: int, rows: int, width: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights, and Hessians of the ReLU of correlated normal inputs."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((width, width), np.float32) / np.float32(width**0.5)
    x = np.maximum(rng.standard_normal((experts, tokens, width), np.float32) @ mix, 0)
    return rng.standard_normal((experts, rows, width), np.float32), x.swapaxes(1, 2) @ x


def arithmetic(rows: int, width: int) -> float:
    """Return the multiplications and additions for one matrix: Cholesky factorization and error feedback."""
    return width**3 / 3 + rows * width**2


def matmul_rate(rounds: int) -> float:
    """Return the floating-point operations per second of a float32 product of 2,048 x 2,048 matrices."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    seconds = measuring.best_seconds({"matmul": lambda i: product(a).block_until_ready()}, rounds)
    return 2 * 2048**3 / seconds["matmul"]


def measure(size: str, matrix: str, rounds: int) -> dict[str, Any]:
    import jax

    from qmoe_jax.quantization import factorize, gptq, ternary_grid
    from qmoe_jax.quantization.reference import gptq_reference

    d_model, d_ff, experts, tokens = SIZES[size]
    rows, width = (d_ff, d_model) if matrix == "wi" else (d_model, d_ff)
    w, hessian = problem(experts, rows, width, tokens)
    device_w, device_hessian = jax.device_put((w, hessian))
    grid = ternary_grid()
    seconds = measuring.best_seconds(
        {
            "gptq": lambda i: jax.block_until_ready(gptq(device_w, device_hessian, grid)),
            "factorize": lambda i: jax.block_until_ready(factorize(device_hessian)),
        },
        rounds,
    )
    start = time.perf_counter()
    _, peer_digits = gptq_reference(w[0], hessian[0], None)
    peer_seconds = time.perf_counter() - start
    equal = float((np.asarray(gptq(device_w, device_hessian, grid).digits[0]) == peer_digits).mean())
    assert equal > 0.995, (
        f"{size} {matrix}: expected the reference's digits but for ties, found {equal:.4f} of them"
    )
    return {
        "size": size,
        "matrix": matrix,
        "out": rows,
        "in": width,
        "experts_at_once": experts,
        "experts_per_second": experts / seconds["gptq"],
        "factorization_share": seconds["factorize"] / seconds["gptq"],
        "ceiling_experts_per_second": matmul_rate(rounds) / arithmetic(rows, width),
        "peer_experts_per_second": 1 / peer_seconds,
        "digits_equal": equal,
    }


def projected_hours(speeds: list[dict[str, Any]]) -> float | None:
    """Return the hours for both matrices of every expert of Switch-c-2048, one after the other."""
    seconds = [1 / row["experts_per_second"] for row in speeds if row["size"] == "c-2048"]
    return C2048_EXPERTS * sum(seconds) / 3600 if seconds else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="stored with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    measuring.use_threads(options.threads)
    result: dict[str, Any] = {
        "machine": measuring.machine(options.threads),
        "note": options.note,
        "speeds": [],
    }
    print("size      matrix    out x in     experts/s  factoring  of ceiling  peer/s speed-up  digits equal")
    for size in options.sizes:
        for matrix in ("wi", "wo"):
            row = measure(size, matrix, options.rounds)
            result["speeds"].append(row)
            speed, peer = row["experts_per_second"], row["peer_experts_per_second"]
            print(
                f"{size:9} {matrix:6} {row['out']:6} x {row['in']:<5} {speed:11.2f}"
                f" {row['factorization_share']:10.0%}"
                f" {speed / row['ceiling_experts_per_second']:11.0%} {peer:8.2f} {speed / peer:6.1f}"
                f" {row['digits_equal']:13.6f}",
                flush=True,
            )
    if (hours := projected_hours(result["speeds"])) is not None:
        result["c2048_projected_hours"] = hours
        print(
            f"\nall {C2048_EXPERTS:,} experts of Switch-c-2048, computed from these speeds: "
            f"{hours:,.0f} hours"
        )
    measuring.write_json(options.json, result)


if __name__ == "__main__":
    main()
