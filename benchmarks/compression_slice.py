"""Compresses a slice of switch-c-2048 in its true shape, measured from outside, beside plain PyTorch.

    python -m benchmarks.compression_slice --json benchmarks/results/compression-slice.json

Takes about fifteen minutes on two cores the first time, five of them to write the checkpoint
(benchmarks.true_shape: one layer of the encoder and one of the decoder with 16 real experts of 2,048), and
needs 8 GB of disk and torch (pip install 'qmoe-jax[benchmarks]'), or `--no-peer`. Prints

  the compression   seconds per expert and peak memory, as a process of its own sees them from outside; how
                    long each stage worked and waited for another; bytes read beside bytes needed
  the projection    hours of the whole model on this machine, at the rates measured here, and on one H100, at
                    stated ones (benchmarks.projection)
  the peer          the same batched GPTQ in PyTorch on the same weights and Hessians, taking turns with ours
                    (benchmarks.gptq_beside_torch)

Chunks span 256 experts, as T5X wrote them, but only 16 are real: reading costs 16 times as much per expert as
in a whole run, where every expert of a chunk is used. `--experts-per-chunk 16` gives the cost of a whole run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import qmoe_jax as qj
from benchmarks import compression_run, gptq_beside_torch, measuring, true_shape
from benchmarks.projection import PAPER, T5X, Projection, project
from qmoe_jax.compression.planning.costs import ExpertStorage, TokenCounts
from qmoe_jax.compression.planning.machine import measure_rates
from qmoe_jax.compression.planning.rates import H100, Rates

MEMORY_GOAL = 6e9
WAITING_GOAL = 0.1


def measure_slice(
    what: true_shape.Slice, folder: Path, tokens: int, experts_per_group: int
) -> dict[str, Any]:
    """Write the checkpoint if it is not there, compress it, and return figures of the compression."""
    checkpoint = true_shape.write(folder / f"checkpoint-{what.experts_per_chunk}", what)
    output = folder / "artifact"
    job = compression_run.Job(str(checkpoint), str(output), what, tokens, experts_per_group)
    result = compression_run.measure(job)
    shutil.rmtree(output, ignore_errors=True)
    walk = sum(result["pipeline"]["compute"].values())
    return result | {
        "experts_per_group": experts_per_group,
        "experts_per_chunk": what.experts_per_chunk,
        "walk_seconds": walk,
        "seconds_per_expert": walk / result["compressed_experts"],
    }


def show_slice(result: dict[str, Any]) -> None:
    """Print the figures of the compression, each with its goal."""
    process, walk = result["process"], result["walk_seconds"]
    print(
        f"{result['compressed_experts']} experts, {result['encoder_tokens']:,} + {result['decoder_tokens']:,}"
        f" tokens, groups of {result['experts_per_group']}, chunks of {result['experts_per_chunk']} experts\n"
        f"the process {process['seconds']:.0f} s, the call {result['seconds']:.0f} s, the walk {walk:.0f} s;"
        f" XLA compiled {result['compilation_seconds']:.0f} s: {result['seconds_per_expert']:.2f} s"
        " per expert\nbefore and after the walk (digests of the checkpoint, dense parameters of all layers):"
        f" {result['seconds'] - walk:.0f} s\n"
        f"peak memory {process['peak_bytes'] / 1e9:.2f} GB (goal: below {MEMORY_GOAL / 1e9:.0f}),"
        f" at most {process['peak_anonymous_bytes'] / 1e9:.2f} GB not of files"
    )
    for name, times in result["pipeline"].items():
        waited = f", waited {times['waited']:6.1f} s ({waiting(times):.0%})" if "waited" in times else ""
        print(f"  {name:8} at work {times['busy']:6.1f} s ({times['busy'] / walk:.0%} of the walk){waited}")
    staging = result["pipeline"]["staging"]
    print(
        f"the devices waited {waiting(result['pipeline']['compute']):.0%} of their time (goal: at most"
        f" {WAITING_GOAL:.0%}); {staging['read'] / 1e9:.1f} GB of chunks decoded for"
        f" {staging['needed'] / 1e9:.1f} GB of experts"
    )


def waiting(times: dict[str, float]) -> float:
    """Return the share of a stage's time that it waited."""
    return times["waited"] / max(times["busy"] + times["waited"], 1e-9)


def projections(what: true_shape.Slice, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Project the whole model on this machine and on one H100, and print the arithmetic.

    The rates of this machine are measured one by one, and the slice is projected with them too: what its walk
    took in truth without compilation, as a multiple of that, is the factor by which the whole model's hours
    are corrected.
    """
    config = qj.CompressionConfig(experts_per_group=result["experts_per_group"])
    rates = measure_rates(what.model, folder)
    here = project(what.model, config, PAPER, T5X, rates)
    h100 = project(what.model, qj.CompressionConfig(), PAPER, T5X, H100)
    slice_hours = _slice_projection(what, result, rates).hours
    factor = (result["walk_seconds"] - result["compilation_seconds"]) / 3600 / slice_hours
    print(f"\nthe whole of the model, {PAPER.encoder:,} + {PAPER.decoder:,} tokens, on")
    print(here)
    print(
        f"the walk, but for compilation, took {factor:.2f} times as long as projected in this way"
        f" ({3600 * slice_hours:.0f} s): corrected, {here.hours * factor:,.0f} h"
    )
    print(f"\n{h100}")
    return {
        "this_machine": here.to_json(),
        "slice_seconds_projected": 3600 * slice_hours,
        "this_machine_corrected_hours": here.hours * factor,
        "h100": h100.to_json(),
    }


def _slice_projection(what: true_shape.Slice, result: dict[str, Any], rates: Rates) -> Projection:
    """Project the slice itself: its experts get all tokens, those of a model that has no others."""
    real = dataclasses.replace(what.model, num_experts=what.experts)
    config = qj.CompressionConfig(
        experts_per_group=result["experts_per_group"], layers=None if what.is_whole else what.layer_option
    )
    samples = -(-result["encoder_tokens"] // true_shape.ENCODER_LENGTH)
    tokens = TokenCounts(samples, result["encoder_tokens"], result["decoder_tokens"])
    return project(real, config, tokens, ExpertStorage(span=what.experts, inflated=True), rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/compression-slice"), help="checkpoint and artifact"
    )
    parser.add_argument("--preset", choices=sorted(qj.PRESETS), default="switch-c-2048")
    parser.add_argument("--experts", type=int, default=16, help="real experts per layer")
    parser.add_argument("--experts-per-chunk", type=int, default=256)
    parser.add_argument("--experts-per-group", type=int, default=4)
    parser.add_argument("--hot", type=float, help="share of the tokens that one expert gets")
    parser.add_argument("--tokens", type=int, default=32_768, help="encoder tokens")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of the peer")
    parser.add_argument("--no-peer", action="store_true", help="compress only")
    parser.add_argument("--note", default="", help="stored with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    if not options.no_peer:
        gptq_beside_torch.load_peer()  # ends the program before an hour is spent, where torch is missing
    threads = os.cpu_count() or 1
    what = true_shape.Slice(
        qj.PRESETS[options.preset],
        experts=options.experts,
        experts_per_chunk=options.experts_per_chunk,
        hot=options.hot,
    )
    result: dict[str, Any] = {
        "machine": measuring.machine(threads),
        "note": options.note,
        "slice": measure_slice(what, options.folder, options.tokens, options.experts_per_group),
    }
    show_slice(result["slice"])
    result["projections"] = projections(what, result["slice"], options.folder)
    if not options.no_peer:
        result["peer"] = gptq_beside_torch.run(options.rounds, threads)
    measuring.write_json(options.json, result)


if __name__ == "__main__":
    main()
