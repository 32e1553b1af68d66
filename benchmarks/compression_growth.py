"""Measures how memory and time of a compression grow: with tokens, with experts, and with one hot expert.

    python -m benchmarks.compression_growth --json benchmarks/results/compression-growth.json

Takes about twenty minutes on two cores; `--plot docs/images/growth.png` draws the curves (matplotlib). A
model of one layer per stack is narrow enough that a million tokens and 2,048 experts run in minutes.
Its chunks span up to 256 experts, as those of switch-c-2048 do, and its slabs of hidden states are an eighth
of the usual size, as its width is of that model's. Every compression is a process of its own, measured from
outside, after one that fills JAX's cache of compiled programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import qmoe_jax as qj
from benchmarks import compression_run, measuring, true_shape
from qmoe_jax.compression.tokens.slabs import SLAB_BYTES

TOKENS = 32_768
"""Encoder tokens of the middle of the curve; there are a quarter as many decoder tokens."""

TOKEN_FACTORS = (0.1, 0.3, 1, 3, 10)
EXPERTS = (64, 256, 1024, 2048)
HOT = 0.5
"""Share of all tokens that the hot expert gets."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One compression: experts per layer, encoder tokens, and the hot expert's share (None: even)."""

    experts: int
    tokens: int
    hot: float | None = None


def points(scale: float) -> list[Point]:
    """Return all compressions to run; those of two curves once. `scale` multiplies tokens and experts."""
    tokens = [int(factor * TOKENS * scale) for factor in TOKEN_FACTORS]
    experts = [max(8, int(count * scale)) for count in EXPERTS]
    curves = [
        *(Point(experts[0], count) for count in tokens),
        *(Point(experts[0], count, HOT) for count in tokens),
        *(Point(count, int(TOKENS * scale)) for count in experts),
    ]
    return list(dict.fromkeys(curves))


def model(experts: int) -> qj.SwitchConfig:
    """Return a narrow model with one layer of experts in each stack."""
    return dataclasses.replace(
        qj.PRESETS["switch-c-2048"],
        d_model=256,
        d_ff=512,
        d_kv=64,
        num_heads=4,
        num_experts=experts,
        num_encoder_layers=1,
        num_decoder_layers=1,
        encoder_sparse_layers=(0,),
        decoder_sparse_layers=(0,),
    )


def measure(point: Point, folder: Path) -> dict[str, Any]:
    """Run the compression of a point twice, and return the figures of the second."""
    what = true_shape.Slice(model(point.experts), experts=point.experts, hot=point.hot)
    name = f"{point.experts}-{point.hot or 'even'}"
    checkpoint = true_shape.write(folder / f"checkpoint-{name}", what)
    slab = SLAB_BYTES * what.model.d_model // qj.PRESETS["switch-c-2048"].d_model
    job = compression_run.Job(str(checkpoint), str(folder / "artifact"), what, point.tokens, 16, slab)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    compression_run.measure(job, **cache)
    return dataclasses.asdict(point) | compression_run.measure(job, **cache)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="for checkpoints and artifacts; by default a temporary one"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies tokens and experts, for a try")
    parser.add_argument("--note", default="", help="stored with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": measuring.machine(os.cpu_count() or 1),
        "note": options.note,
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="growth-") as temporary:
        folder = options.folder or Path(temporary)
        print("experts   tokens  hot  seconds  peak MB")
        for point in points(options.scale):
            row = measure(point, folder)
            result["runs"].append(row)
            print(
                f"{point.experts:7,} {point.tokens:8,} {point.hot or 0:4.0%} {row['seconds']:8.1f}"
                f" {row['process']['peak_bytes'] / 1e6:8,.0f}",
                flush=True,
            )
    measuring.write_json(options.json, result)
    if options.plot:
        from benchmarks.growth_plot import plot_growth

        plot_growth(result["runs"], options.plot)


if __name__ == "__main__":
    main()
