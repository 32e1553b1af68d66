"""What the GPU benchmarks share: random experts, times by slope, the device named, where results go."""

from __future__ import annotations

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

P_ZERO = 0.885
COLD_BYTES = 192 << 20  # several times an H100's or H200's L2 cache


class Expert(NamedTuple):
    """A random ternary matrix: its digits, its two levels a row, and itself in float64."""

    digits: np.ndarray
    levels: np.ndarray
    weights: np.ndarray

    @classmethod
    def random(cls, rows: int, width: int) -> Expert:
        rng = np.random.default_rng(0)
        digits = ((rng.random((rows, width)) >= P_ZERO) * rng.integers(1, 3, (rows, width))).astype(np.uint8)
        levels = np.stack([-rng.random(rows) - 0.1, rng.random(rows) + 0.1], -1).astype(jnp.bfloat16)
        table = np.pad(levels.astype(np.float64), ((0, 0), (1, 0)))
        return cls(digits, levels, np.take_along_axis(table, digits.astype(np.int64), 1))

    def packed(self, codebook: Any, experts: int) -> Any:
        """As many experts, alike but each in its own memory, on the device."""
        from qmoe_jax.coding import encode, pack

        levels = np.broadcast_to(self.levels, (experts, *self.levels.shape))
        stream = encode(self.digits, codebook)
        return jax.device_put(pack([stream] * experts, levels, codebook, self.digits.shape[1]))


def cold_count(nbytes: int, most: int = 256) -> int:
    """Copies of something that must be visited in turn so that each is out of the cache when its turn comes."""
    return int(min(max(2, -(-COLD_BYTES // nbytes)), most))


def slope_seconds(
    launch: Callable[..., Any], operands: Sequence[Any], shared: Any, counts: tuple[int, int], rounds: int = 5
) -> float:
    """Seconds of one launch: many in one program less few in one, so that what a program costs cancels.

    `launch(shared, operands[i])` runs with the operands in turn; `shared` is the arrays that all of them need.
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
    """Bytes a second that the device copies, read and written counted."""
    arrays = [jnp.full(nbytes // 4, i, jnp.float32) for i in range(2)]
    return 2 * nbytes / slope_seconds(lambda _, x: -x, arrays, None, (2, 6))


def relative_error(found: Any, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm; NaN is infinite."""
    error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
    return float(error) if np.isfinite(error) else float("inf")


def device() -> dict[str, Any]:
    """What ran, for a result."""
    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    return {
        "device": first.device_kind,
        "platform": first.platform,
        "memory_bytes": stats.get("bytes_limit"),
        "jax": jax.__version__,
    }


def require_gpu(rehearsal: bool) -> None:
    """Exits with a reason where there is no GPU to measure."""
    if jax.default_backend() != "gpu" and not rehearsal:
        raise SystemExit(
            f"expected a CUDA device, found {jax.devices()[0].device_kind}: nothing is measured here "
            f"(--rehearse runs the whole script on tiny shapes, as a check of the script alone)"
        )


def result_path(name: str, explicit: str | None) -> pathlib.Path:
    """`explicit`, else `<name>-<device>.json` in $OUT, else in benchmarks/results."""
    if explicit:
        return pathlib.Path(explicit)
    folder = pathlib.Path(os.environ.get("OUT") or pathlib.Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{'-'.join(jax.devices()[0].device_kind.lower().split())}.json"
