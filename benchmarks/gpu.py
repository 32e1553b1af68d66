"""Packed experts, timing by slope, device descriptions and result paths, shared by the GPU benchmarks."""

from __future__ import annotations

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.samples import TernaryMatrix
from pallas_kernels import PackedMatrix
from qmoe_jax.coding import Codebook, encode, pack

COLD_BYTES = 192 << 20  # several times an H100's or H200's L2 cache


def pack_copies(matrix: TernaryMatrix, codebook: Codebook, experts: int) -> PackedMatrix:
    """Return `experts` experts on the device, equal but each in memory of its own."""
    levels = np.broadcast_to(matrix.levels, (experts, *matrix.levels.shape))
    stream = encode(matrix.digits, codebook)
    return jax.device_put(pack([stream] * experts, levels, codebook, matrix.digits.shape[1]))


def cold_count(nbytes: int, most: int = 256) -> int:
    """Return the number of copies to use in turn so that each has left the cache before its next turn."""
    return int(min(max(2, -(-COLD_BYTES // nbytes)), most))


def slope_seconds(
    launch: Callable[..., Any], operands: Sequence[Any], shared: Any, counts: tuple[int, int], rounds: int = 5
) -> float:
    """Return the seconds per launch: a program of many launches minus one of few, so that fixed costs cancel.

    Args:
        launch: called as `launch(shared, operand)`.
        operands: used in turn.
        shared: the arrays that every launch needs.
        counts: launches in the short program and in the long one.
        rounds: measurements; the median is returned.
    """

    def program(count: int) -> Callable[[], Any]:
        chosen = [operands[i % len(operands)] for i in range(count)]
        compiled = jax.jit(lambda shared, chosen: [launch(shared, operand) for operand in chosen])
        jax.block_until_ready(compiled(shared, chosen))
        return lambda: jax.block_until_ready(compiled(shared, chosen))

    few, many = (program(count) for count in counts)
    slopes = []
    for _ in range(rounds):
        start = time.perf_counter()
        few()
        between = time.perf_counter()
        many()
        end = time.perf_counter()
        slopes.append(((end - between) - (between - start)) / (counts[1] - counts[0]))
    return statistics.median(slopes)


def copy_bandwidth(nbytes: int) -> float:
    """Return the bytes per second that the device copies, counting both reads and writes."""
    arrays = [jnp.full(nbytes // 4, i, jnp.float32) for i in range(2)]
    return 2 * nbytes / slope_seconds(lambda _, x: -x, arrays, None, (2, 6))


def relative_error(found: Any, wanted: np.ndarray) -> float:
    """Return the norm of the difference over the norm of `wanted`; infinity for NaN."""
    error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
    return float(error) if np.isfinite(error) else float("inf")


def device() -> dict[str, Any]:
    """Return the device and the version of jax."""
    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    return {
        "device": first.device_kind,
        "platform": first.platform,
        "memory_bytes": stats.get("bytes_limit"),
        "jax": jax.__version__,
    }


def require_gpu(rehearsal: bool) -> None:
    """Exit with a reason without a GPU to measure, unless this is a rehearsal."""
    if jax.default_backend() != "gpu" and not rehearsal:
        raise SystemExit(
            f"expected a CUDA device, found {jax.devices()[0].device_kind}: nothing is measured here "
            f"(--rehearse runs the whole script on tiny shapes, as a check of the script alone)"
        )


def result_path(name: str, explicit: str | None) -> pathlib.Path:
    """Return `explicit`, or `<name>-<device>.json` in $OUT or else in benchmarks/results."""
    if explicit:
        return pathlib.Path(explicit)
    folder = pathlib.Path(os.environ.get("OUT") or pathlib.Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{'-'.join(jax.devices()[0].device_kind.lower().split())}.json"
