"""An artifact of a published model's true shape with random weights, for measuring what no checkpoint at hand can.

    python benchmarks/random_artifact.py switch-c-2048 runs/c2048-random --disk 20

Every expert file has the size and layout that a compressed model has: codewords drawn as the code of independent
digits with P(0) = .885 draws them, rows cut where they are full. As many of them are written as `--disk` allows
(GB); the manifest then names each file for several layers. Dense weights are random, in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numba
import numpy as np
from flax import traverse_util
from jax import numpy as jnp
from rich.progress import Progress

import qmoe_jax as qj
from qmoe_jax.artifact.codebook_file import CODEBOOKS, render_codebooks
from qmoe_jax.artifact.dense import save_dense
from qmoe_jax.artifact.groups import GroupKey, render_group
from qmoe_jax.artifact.kinds import Ternary
from qmoe_jax.artifact.manifest import MANIFEST, RUN, GroupRecord, Manifest, Run, canonical
from qmoe_jax.artifact.matrices import PackedExpertMatrix
from qmoe_jax.artifact.store import REPORT
from qmoe_jax.artifact.sums import SUMS, listed_files, render_sums
from qmoe_jax.coding import Codebook, tunstall_codebook
from qmoe_jax.files.durable import FileRecord, record_of, record_of_pieces, write_durably
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.parameters import ExpertKernel, expert_shapes, is_expert

P_ZERO = 0.885
EXPERTS_PER_FILE = 16  # or all, where a layer has fewer


@dataclasses.dataclass(frozen=True)
class Streams:
    """Draws rows of codewords: a codeword as often as the code of independent digits has it.

    `likely` gives the codeword for each of 2**16 random numbers.
    """

    codebook: Codebook
    likely: np.ndarray

    @classmethod
    def of(cls, codebook: Codebook) -> Streams:
        """The codewords' probabilities are those of their digits; together they are 1."""
        nonzeros = (codebook.digits != 0).sum(1)
        probability = P_ZERO ** (codebook.lengths - nonzeros) * ((1 - P_ZERO) / 2) ** nonzeros
        counts = np.floor(probability * 2**16).astype(int)
        counts[np.argmax(counts)] += 2**16 - counts.sum()
        return cls(codebook, np.repeat(np.arange(len(counts)), counts).astype(codebook.code_dtype))

    def draw(self, rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(codes, codewords of each row) of a matrix."""
        codes = np.empty((rows, 2 * width // 8 + 64), self.codebook.code_dtype)
        counts = np.empty(rows, np.int64)
        _draw(self.likely, self.codebook.lengths, width, np.uint64(seed), codes, counts)
        return np.concatenate([row[:count] for row, count in zip(codes, counts, strict=True)]), counts


@numba.njit(parallel=True)
def _draw(likely, lengths, width, seed, codes, counts):
    for row in numba.prange(len(codes)):
        state = (seed * np.uint64(1_000_003) + np.uint64(row)) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        column, count = 0, 0
        while column < width:
            state ^= state << np.uint64(13)  # xorshift64
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
            code = likely[state >> np.uint64(48)]
            codes[row, count] = code
            count += 1
            column += lengths[code]
        counts[row] = count


def draw_expert(
    streams: Streams, matrices: Mapping[str, tuple[int, int]], seed: int
) -> dict[str, PackedExpertMatrix]:
    """An expert whose outputs are about as large as its inputs."""
    expert, rng = {}, np.random.default_rng(seed)
    for index, (name, (rows, width)) in enumerate(matrices.items()):
        codes, counts = streams.draw(rows, width, 2 * seed + index)
        size = 1 / math.sqrt((1 - P_ZERO) * width)
        levels = size * rng.uniform(0.5, 1.5, (rows, 2)) * np.array([-1, 1])
        parts = {
            "levels": levels.astype(ml_dtypes.bfloat16),
            "counts": counts.astype(np.uint16),
            "codes": codes,
        }
        expert[name] = PackedExpertMatrix(Ternary(streams.codebook.name), (rows, width), parts)
    return expert


def dense_tree(config: qj.SwitchConfig) -> dict[str, Any]:
    """Random parameters but the experts', bfloat16 (the routers' float32): matrices keep their inputs' size."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(SwitchTransformer(config).init, jax.random.key(0), tokens, tokens)["params"]
    rng, arrays = np.random.default_rng(0), {}
    for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        if is_expert(name):
            continue
        shape = (leaf.unbox() if hasattr(leaf, "unbox") else leaf).shape
        dtype = np.float32 if "/router/" in name else ml_dtypes.bfloat16
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("/kernel"):
            values *= shape[0] ** -0.5
        arrays[name] = np.ones(shape, dtype) if name.endswith("/scale") else values.astype(dtype)
    return traverse_util.unflatten_dict(arrays, sep="/")


def layers_of(config: qj.SwitchConfig) -> list[tuple[str, int]]:
    return [(stack, layer) for stack in ("encoder", "decoder") for layer in config.sparse_layers(stack)]


def files_a_layer(config: qj.SwitchConfig) -> int:
    return max(1, config.num_experts // EXPERTS_PER_FILE)


def write_experts(
    root: Path, config: qj.SwitchConfig, run: Run, codebook: Codebook, disk: float
) -> Iterator[tuple[int, int, GroupRecord]]:
    """Writes the expert files of as many layers as `disk` bytes hold (one at least); yields how many of how many."""
    streams, matrices = Streams.of(codebook), expert_shapes(config)
    files, size = files_a_layer(config), config.num_experts // files_a_layer(config)
    number, total = 0, files
    for stack, layer in layers_of(config):
        for file in range(files):
            key = GroupKey(stack, layer, file * size, (file + 1) * size)
            experts = [draw_expert(streams, matrices, number * size + i) for i in range(size)]
            record = write_durably(root / key.path, render_group(key, experts, run.digest))
            if number == 0:
                layers = int(disk / (files * 1.01 * record.bytes))  # files differ by less than that
                total = files * min(max(1, layers), len(layers_of(config)))
            number += 1
            yield number, total, GroupRecord(key, key.path, record)
        if number == total:
            return


def share(config: qj.SwitchConfig, written: list[GroupRecord]) -> tuple[GroupRecord, ...]:
    """A record for each group of every layer; the layers take turns with the ones written."""
    files = files_a_layer(config)
    distinct = len(written) // files
    records = []
    for index, (stack, layer) in enumerate(layers_of(config)):
        for file in range(files):
            source = written[(index % distinct) * files + file]
            key = dataclasses.replace(source.key, stack=stack, layer=layer)
            records.append(GroupRecord(key, source.path, source.record))
    return tuple(sorted(records, key=lambda record: record.key))


def write(root: Path, preset: str, disk: float) -> int:
    """Writes the artifact; returns in how many layers experts are distinct."""
    config, codebook = qj.PRESETS[preset], tunstall_codebook(P_ZERO)
    source = {"random": True, "p_zero": P_ZERO, "disk": disk}
    run = Run(config, {"method": "random"}, source, {codebook.name: codebook.digest})
    root.mkdir(parents=True, exist_ok=True)
    files: dict[str, FileRecord] = {}
    for name, content in ((RUN, canonical(run.to_json())), (CODEBOOKS, render_codebooks([codebook]))):
        files[name] = write_durably(root / name, [content])
    with Progress() as bar:
        task, written = bar.add_task("experts", total=None), []
        for done, total, record in write_experts(root, config, run, codebook, disk):
            written.append(record)
            bar.update(task, completed=done, total=total)
    groups = share(config, written)
    kinds = {
        ExpertKernel(stack, layer, matrix).path: Ternary(codebook.name)
        for stack, layer in layers_of(config)
        for matrix in expert_shapes(config)
    }
    dense = save_dense(root, dense_tree(config))
    manifest = Manifest(run, kinds, groups, dense, files, {"random": True})
    write_durably(root / REPORT, [canonical({})])
    sums = {path: record_of(root / path).sha256 for path in listed_files(root)}
    sums[MANIFEST] = record_of_pieces([manifest.render()]).sha256
    write_durably(root / SUMS, [render_sums(sums)])
    write_durably(root / MANIFEST, [manifest.render()])
    return len(written) // files_a_layer(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=sorted(qj.PRESETS))
    parser.add_argument("output", type=Path)
    parser.add_argument("--disk", type=float, default=20, help="GB of expert files at most")
    options = parser.parse_args()
    layers = write(options.output, options.preset, options.disk * 1e9)
    print(f"{options.output}: experts of {layers} layers written; further layers point at the same files")


if __name__ == "__main__":
    main()
