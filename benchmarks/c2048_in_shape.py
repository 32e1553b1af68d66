"""Generates from switch-c-2048 in its true shape, 1.57 trillion parameters, with its experts on disk.

    python -m benchmarks.c2048_in_shape --json benchmarks/results/c2048-in-shape.json

First writes an artifact of 30 layers of 2,048 experts with random weights if there is none
(benchmarks.random_artifact; `--disk` GB of files, which the other layers share), which takes a minute or two.
Then loads it with its experts on disk, reads prompts of 64 tokens and generates 64 tokens each at temperature
1, so that routing does not repeat itself; a few minutes. Prints tokens per second and how the time per token
divides, for each batch size and state:

  cold      no expert file in the system's page cache, no expert in the program's cache
  warm      the same experts again: in the page cache, not in the program's
  repeated  the same experts again, as many as fit in the program's cache

and, in the same run, for the same model with one dense float32 expert that all tokens share.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import qmoe_jax as qj
from benchmarks import measuring, random_artifact
from qmoe_jax.artifact.manifest import MANIFEST
from qmoe_jax.evaluation.throughput import Generator, Throughput
from qmoe_jax.inference.placement import DiskExperts, stores_of
from qmoe_jax.inference.sampling import Sampling

PRESET = "switch-c-2048"


@jax.tree_util.register_pytree_node_class
class SharedExpert:
    """One dense expert for all tokens, as a parameter `expert/placed`."""

    def __init__(self, wi: Any, wo: Any):
        self.wi, self.wo = wi, wo

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self.wi, self.wo), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, Any]) -> SharedExpert:
        return cls(*children)

    def __call__(self, x: Any, expert: Any, scale: Any, *, num_experts: int) -> Any:
        return scale[:, None] * (jax.nn.relu(x @ self.wi) @ self.wo)


def with_shared_expert(config: qj.SwitchConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with one dense expert per layer, in memory of its own as a routed expert is."""
    shape, rng = (config.d_model, config.d_ff), np.random.default_rng(0)
    wi = rng.standard_normal(shape, np.float32) * config.d_model**-0.5
    params = dict(params)
    for stack, number in random_artifact.sparse_layers(config):
        layer = params[stack][f"layers_{number}"]
        shared = SharedExpert(jnp.array(wi), jnp.array(wi.T))
        mlp = {**layer["mlp"], "expert": {"placed": shared}}
        params[stack] = {**params[stack], f"layers_{number}": {**layer, "mlp": mlp}}
    return params


def forget_files(root: Path) -> None:
    """Drop the expert files from the page cache."""
    for path in root.glob("experts/**/*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def run(generator: Generator, prepare: Callable[[], object]) -> Throughput:
    prompts = np.random.default_rng(generator.shape[0]).integers(2, 32000, generator.shape)
    prepare()
    return generator.measure(prompts)


def packed_runs(
    root: Path, model: Any, params: dict[str, Any], batch: int, lengths: tuple[int, int]
) -> dict[str, Throughput]:
    (store,) = stores_of(params)
    assert isinstance(store, DiskExperts)
    generator = Generator(model, params, (batch, lengths[0]), lengths[1])

    def cold() -> None:
        store.clear()
        forget_files(root)

    return {
        name: run(generator, prepare)
        for name, prepare in {"cold": cold, "warm": store.clear, "repeated": lambda: None}.items()
    }


def memory_rate(config: qj.SwitchConfig) -> float:
    """Return the bytes per second at which XLA reads a dense float32 matrix to multiply one token by it."""
    product = jax.jit(lambda x, w: x @ w)
    x, w = jnp.ones((1, config.d_model)), jnp.ones((config.d_model, config.vocab_size))
    run = {"product": lambda i: product(x, w).block_until_ready()}
    return w.nbytes / measuring.best_seconds(run, 10)["product"]


def disk_rate(root: Path) -> float:
    """Return the bytes per second of reading single experts one after another, none in the page cache."""
    reader = qj.open_checkpoint(root, check=False)
    forget_files(root)
    chosen = np.random.default_rng(1).integers(reader.config.num_experts, size=64)
    extents = [reader.expert_extent("encoder", i % 5, int(e)) for i, e in enumerate(chosen)]
    began = time.perf_counter()
    nbytes = sum(len(extent.read()) for extent in extents)
    return nbytes / (time.perf_counter() - began)


def sampling_seconds(batch: int, vocabulary: int) -> float:
    """Return the seconds that drawing a token for each row takes by itself."""
    choose = jax.jit(Sampling(1.0).choose)
    logits = jnp.zeros((batch, vocabulary))
    draw = {"draw": lambda i: choose(logits, jax.random.key(i)).block_until_ready()}
    return measuring.best_seconds(draw, 20)["draw"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/c2048-random"))
    parser.add_argument("--disk", type=float, default=20, help="GB of expert files to write (20)")
    parser.add_argument("--expert-cache", type=float, default=2, help="GB of experts in memory (2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--note", default="", help="stored with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    config = qj.PRESETS[PRESET]
    if not (options.folder / MANIFEST).exists():
        random_artifact.write(options.folder, PRESET, options.disk * 1e9)
    lengths = options.prompt, options.new
    model, params = qj.load_compressed(
        options.folder, experts="disk", expert_cache=int(options.expert_cache * 1e9)
    )
    runs = {batch: packed_runs(options.folder, model, params, batch, lengths) for batch in options.batches}
    resident = resident_bytes()
    sampling = {batch: sampling_seconds(batch, config.vocab_size) for batch in options.batches}
    dense = with_shared_expert(config, params)
    for batch in options.batches:
        shape = batch, options.prompt
        runs[batch]["dense float32"] = run(Generator(model, dense, shape, options.new), lambda: None)
    files = list(options.folder.glob("experts/**/*.safetensors"))
    result = {
        "machine": measuring.machine(os.cpu_count() or 1),
        "note": options.note,
        "expert_parameters": config.expert_parameters,
        "distinct_layers": len(files) // random_artifact.files_per_layer(config),
        "expert_files_bytes": sum(file.stat().st_size for file in files),
        "expert_cache_bytes": int(options.expert_cache * 1e9),
        "peak_resident_bytes": resident,
        "memory_gigabytes_per_second": memory_rate(config) / 1e9,
        "disk_gigabytes_per_second": disk_rate(options.folder) / 1e9,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "runs": [
            as_json(batch, name, throughput, sampling[batch])
            for batch, found in runs.items()
            for name, throughput in found.items()
        ],
    }
    measuring.write_json(options.json, result)
    show(result)


def as_json(batch: int, name: str, throughput: Throughput, sampling: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "state": name,
        "sampling_milliseconds_per_step": 1e3 * sampling,
        "reading": throughput.reading.to_json(),
        "writing": throughput.writing.to_json(),
    }


def show(result: dict[str, Any]) -> None:
    gigabytes = result["expert_files_bytes"] / 1e9
    table = Table(
        *(
            "batch",
            "state",
            "tokens/s",
            "prompt tokens/s",
            "MB read/token",
            "ms/token: I/O wait",
            "experts",
            "other",
        ),
        title=f"{result['expert_parameters'] / 1e12:.2f} T expert parameters, {gigabytes:.1f} GB of files "
        f"for {result['distinct_layers']} of 30 layers; peak resident "
        f"{result['peak_resident_bytes'] / 1e9:.2f} GB; "
        f"memory {result['memory_gigabytes_per_second']:.0f} GB/s, "
        f"disk {result['disk_gigabytes_per_second']:.1f} GB/s",
    )
    for row in result["runs"]:
        writing = row["writing"]
        split = writing.get("milliseconds_per_token", {})
        table.add_row(
            str(row["batch"]),
            row["state"],
            f"{writing['tokens_per_second']:.1f}",
            f"{row['reading']['tokens_per_second']:.1f}",
            f"{writing.get('bytes_read_per_token', 0) / 1e6:.1f}",
            *(f"{value:.1f}" for value in split.values()),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
