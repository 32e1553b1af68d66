"""Compresses a slice that `benchmarks.true_shape` wrote; the process that a benchmark measures from outside.

    python -m benchmarks.compression_run job.json

Reads a job (`Job`) and writes its result beside it: seconds of the compression itself, without the start of
Python and of JAX, and figures of its report. `measure` does so in a child process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax

import qmoe_jax as qj
from benchmarks import process_meter, true_shape
from qmoe_jax.compression.tokens import slabs


@dataclasses.dataclass(frozen=True)
class Job:
    """A compression to run.

    Attributes:
        checkpoint: what to open.
        output: the artifact.
        what: the slice that the checkpoint is.
        tokens: encoder tokens of the calibration samples.
        experts_per_group: option of the compression.
        slab_bytes: bytes of hidden states in a slab; None: the compression's own choice. A narrow model has
            smaller ones in proportion.
    """

    checkpoint: str
    output: str
    what: true_shape.Slice
    tokens: int
    experts_per_group: int
    slab_bytes: int | None = None

    def config(self) -> qj.CompressionConfig:
        """Return the options.

        The token cap is 4 even shares of the real experts, which get the tokens of all.
        """
        what = self.what
        return qj.CompressionConfig(
            experts_per_group=self.experts_per_group,
            token_cap=4.0 * what.model.num_experts / what.experts,
            layers=None if what.is_whole else what.layer_option,
            experts=None if what.is_whole else what.expert_option,
        )

    def run(self) -> dict[str, Any]:
        """Compress, and return the seconds and the figures of the report."""
        if self.slab_bytes is not None:
            slabs.SLAB_BYTES = self.slab_bytes
        samples = true_shape.examples(self.what, self.tokens)
        compiling = _CompilationClock()
        jax.monitoring.register_event_duration_secs_listener(compiling)
        began = time.monotonic()
        report = qj.compress(self.checkpoint, self.output, samples, self.config())
        seconds = time.monotonic() - began
        return {
            "seconds": seconds,
            "compilation_seconds": compiling.seconds,
            "compressed_experts": sum(len(group.routed_tokens) for group in report.groups),
            "encoder_tokens": sum(len(sample.encoder) for sample in samples),
            "decoder_tokens": sum(len(sample.decoder) for sample in samples),
            "calibration_tokens": sum(sum(group.calibration_tokens) for group in report.groups),
            "hottest_share": max(
                max(layer.routed_tokens) / sum(layer.routed_tokens) for layer in report.layers
            ),
            "sparsity": report.sparsity,
            "output_error": {layer.name: layer.output_error for layer in report.layers},
            "bits_per_parameter": {layer.name: layer.bits_per_parameter for layer in report.layers},
            "fallbacks": len(report.fallbacks),
            "pipeline": {name: dict(times) for name, times in report.pipeline.items()},
        }

    def write(self, path: Path) -> None:
        """Write the job for `read`."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job that `write` wrote."""
        fields = json.loads(path.read_text())
        what = fields["what"]
        model = {name: tuple(v) if isinstance(v, list) else v for name, v in what["model"].items()}
        what = true_shape.Slice(**{**what, "model": qj.SwitchConfig(**model)})
        return cls(**{**fields, "what": what})


class _CompilationClock:
    """Sums up the time that XLA compiles."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds


def measure(job: Job, **environment: str) -> dict[str, Any]:
    """Run a job in a process of its own, from the start, and return its result with what the process used."""
    shutil.rmtree(job.output, ignore_errors=True)
    path = Path(f"{job.output}.job.json")
    job.write(path)
    command = [sys.executable, "-m", "benchmarks.compression_run", str(path)]
    usage = process_meter.run(command, {**os.environ, **environment})
    return json.loads(result_path(path).read_text()) | {"process": dataclasses.asdict(usage)}


def result_path(job: Path) -> Path:
    """Return the file that the result of a job is written to."""
    return job.with_suffix(".result.json")


if __name__ == "__main__":
    result_path(Path(sys.argv[1])).write_text(json.dumps(Job.read(Path(sys.argv[1])).run()))
