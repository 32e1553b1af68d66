"""Random packed experts with the dense weights that they represent."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.samples import P_ZERO, dequantize, random_digits
from pallas_kernels import PackedMatrix
from qmoe_jax.coding import Codebook, encode, pack, tunstall_codebook, upstream_codebook

# One row for each shape of a table: (words, slots) = (1, 3), (1, 2), (1, 2) with 16-bit codes, (2, 4).
CODEBOOKS = {
    "upstream": upstream_codebook,
    "tunstall-8": tunstall_codebook,
    "tunstall-10": functools.partial(tunstall_codebook, code_bits=10),
    "tunstall-12-dense": functools.partial(tunstall_codebook, p_zero=0.34, code_bits=12),
}


class Sample(NamedTuple):
    packed: PackedMatrix
    weights: np.ndarray  # float64 [expert, out, in]


def sample(
    codebook: Codebook, shape: tuple[int, int, int], *, p_zero=P_ZERO, levels="bfloat16", seed=0
) -> Sample:
    """Draw experts of `shape` [expert, out, in]; `p_zero` is one sparsity, or one per expert."""
    experts, rows, width = shape
    rng = np.random.default_rng(seed)
    digits = random_digits(shape, np.broadcast_to(p_zero, experts)[:, None, None], rng)
    extremes = np.stack([-rng.random((experts, rows)) - 0.1, rng.random((experts, rows)) + 0.1], -1)
    extremes = extremes.astype(jnp.dtype(levels))
    packed = pack([encode(d, codebook) for d in digits], extremes, codebook, width)
    packed.validate()
    return Sample(packed, dequantize(digits, extremes))


def tokens(sample_: Sample, count: int, dtype="float32", seed=1) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Return (x, expert index); every expert may get many tokens, or none."""
    rng = np.random.default_rng(seed)
    experts, _, width = sample_.weights.shape
    x = jnp.asarray(rng.standard_normal((count, width)), jnp.float32).astype(dtype)
    return x, jnp.asarray(rng.integers(0, experts, count) ** 2 // max(experts - 1, 1), jnp.int32)


def products(sample_: Sample, x, expert_index) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact product and the sum of the magnitudes of its terms, float64."""
    weights = sample_.weights[np.asarray(expert_index)]
    x = np.asarray(x, np.float64)
    return np.einsum("toi,ti->to", weights, x), np.einsum("toi,ti->to", np.abs(weights), np.abs(x))


def corrupted(packed: PackedMatrix, seed: int) -> PackedMatrix:
    """Return random codes, many beyond the table if possible, and random offsets, many out of range."""
    rng = np.random.default_rng(seed)
    top = np.iinfo(packed.codes.dtype).max
    codes = rng.integers(0, top, packed.codes.shape, endpoint=True).astype(packed.codes.dtype)
    offsets = packed.row_offsets
    if seed % 2:
        capacity = packed.codes.shape[1]
        offsets = rng.integers(-capacity, 2 * capacity, offsets.shape).astype(np.int32)
    return dataclasses.replace(packed, codes=codes, row_offsets=offsets)
