"""Writes an artifact of a published model's true shape with random weights, where no checkpoint is at hand.

    python -m benchmarks.random_artifact switch-c-2048 runs/c2048-random --disk 20

Takes a minute or two for 20 GB and prints how many layers have expert files of their own. Every expert file
has the size and layout of a compressed model: codewords are drawn with the frequencies of independent digits
with P(0) = .885, and rows end where they are full. As many files are written as `--disk` allows (GB); the
manifest then names each file for several layers. Dense weights are random, in bfloat16. An interrupted run is
resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numba
import numpy as np
from flax import traverse_util
from rich.progress import track

import qmoe_jax as qj
from benchmarks.samples import P_ZERO, codeword_probabilities
from qmoe_jax.artifact import ArtifactWriter, GroupKey, PackedExpertMatrix, Ternary
from qmoe_jax.coding import Codebook, tunstall_codebook
from qmoe_jax.files.tensor import Tensor, in_memory
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.parameters import expert_shapes, is_expert

EXPERTS_PER_FILE = 16  # or all, where a layer has fewer


@dataclasses.dataclass(frozen=True)
class CodewordSampler:
    """Draws rows of codewords with the frequencies that they have in the code of independent digits.

    Attributes:
        codebook: the codebook.
        likely: the codeword for each of 2**16 equally likely random numbers.
    """

    codebook: Codebook
    likely: np.ndarray

    @classmethod
    def of(cls, codebook: Codebook) -> CodewordSampler:
        """Return the sampler for digits with P(0) = .885."""
        counts = np.floor(codeword_probabilities(codebook) * 2**16).astype(int)
        counts[np.argmax(counts)] += 2**16 - counts.sum()
        return cls(codebook, np.repeat(np.arange(len(counts)), counts).astype(codebook.code_dtype))

    def draw(self, rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes of a matrix, row after row, and the number of codewords of each row."""
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


def random_expert(
    sampler: CodewordSampler, matrices: Mapping[str, tuple[int, int]], seed: int
) -> dict[str, PackedExpertMatrix]:
    """Draw an expert whose outputs are about as large as its inputs."""
    expert, rng = {}, np.random.default_rng(seed)
    for index, (name, (rows, width)) in enumerate(matrices.items()):
        codes, counts = sampler.draw(rows, width, 2 * seed + index)
        size = 1 / math.sqrt((1 - P_ZERO) * width)
        levels = size * rng.uniform(0.5, 1.5, (rows, 2)) * np.array([-1, 1])
        parts = {
            "levels": levels.astype(ml_dtypes.bfloat16),
            "counts": counts.astype(np.uint16),
            "codes": codes,
        }
        expert[name] = PackedExpertMatrix(Ternary(sampler.codebook.name), (rows, width), parts)
    return expert


def random_dense(config: qj.SwitchConfig) -> dict[str, Tensor]:
    """Draw the dense parameters by path: bfloat16, routers float32. Products keep the size of inputs."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(SwitchTransformer(config).init, jax.random.key(0), tokens, tokens)["params"]
    rng, arrays = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        if is_expert(name):
            continue
        shape = (leaf.unbox() if hasattr(leaf, "unbox") else leaf).shape
        dtype = np.float32 if "/router/" in name else ml_dtypes.bfloat16
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("/kernel"):
            values *= shape[0] ** -0.5
        arrays[name] = np.ones(shape, dtype) if name.endswith("/scale") else values.astype(dtype)
    return {name: in_memory(array) for name, array in arrays.items()}


def sparse_layers(config: qj.SwitchConfig) -> list[tuple[str, int]]:
    """Return (stack, layer) of every layer with experts."""
    return [(stack, layer) for stack in ("encoder", "decoder") for layer in config.sparse_layers(stack)]


def files_per_layer(config: qj.SwitchConfig) -> int:
    """Return the number of expert files of a layer."""
    return max(1, config.num_experts // EXPERTS_PER_FILE)


def write_experts(artifact: ArtifactWriter, config: qj.SwitchConfig, codebook: Codebook, disk: float) -> int:
    """Write the experts of the layers that fit in `disk` bytes, at least one; link the other layers to them.

    Returns:
        The number of layers written.
    """
    sampler, matrices, layers = CodewordSampler.of(codebook), expert_shapes(config), sparse_layers(config)
    files, size = files_per_layer(config), config.num_experts // files_per_layer(config)

    def write(number: int) -> GroupKey:
        stack, layer = layers[number // files]
        start = number % files * size
        key = GroupKey(stack, layer, start, start + size)
        if not artifact.has_group(stack, layer, key.start, key.stop):
            experts = [random_expert(sampler, matrices, number * size + i) for i in range(size)]
            artifact.write_group(stack, layer, start, experts)
        return key

    first = (artifact.root / write(0).path).stat().st_size
    distinct = min(max(1, int(disk / (files * 1.01 * first))), len(layers))  # sizes differ by less than 1 %
    written = [write(number) for number in track(range(files * distinct), "experts")]
    for index, (stack, layer) in enumerate(layers[distinct:], distinct):
        for source in written[index % distinct * files :][:files]:
            artifact.link_group(stack, layer, source)
    return distinct


def write(root: Path, preset: str, disk: float) -> int:
    """Write the artifact and return the number of layers with expert files of their own.

    Args:
        root: a directory that is missing or empty, or that a stopped run of this program left.
        preset: a name in `qmoe_jax.PRESETS`.
        disk: bytes of expert files at most.
    """
    config, codebook = qj.PRESETS[preset], tunstall_codebook(P_ZERO)
    source = {"random": True, "p_zero": P_ZERO, "disk": disk}
    with ArtifactWriter(
        root, config=config, options={"method": "random"}, source=source, codebooks=[codebook]
    ) as artifact:
        layers = write_experts(artifact, config, codebook, disk)
        artifact.write_dense(random_dense(config))
        artifact.finish({"random": True})
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=sorted(qj.PRESETS))
    parser.add_argument("output", type=Path)
    parser.add_argument("--disk", type=float, default=20, help="GB of expert files at most")
    options = parser.parse_args()
    layers = write(options.output, options.preset, options.disk * 1e9)
    print(f"{options.output}: experts of {layers} layers written; the other layers refer to the same files")


if __name__ == "__main__":
    main()
