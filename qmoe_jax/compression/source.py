"""What a compression reads, as digests: a run goes on only with the same checkpoint and the same examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from qmoe_jax.checkpoints.reader import Reader, is_expert
from qmoe_jax.coding import Codebook, tunstall_codebook, upstream_codebook
from qmoe_jax.compression.calibration import Example
from qmoe_jax.compression.experts import wide_names
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.quantization import round_to_nearest


def expert_kernel(stack: str, layer: int, matrix: str) -> str:
    """The T5X path of an expert matrix."""
    return f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel"


def checkpoint_digest(reader: Reader) -> str:
    """SHA-256 of every name, shape and dtype, and of the content of all but the experts.

    Experts are left out because they are nearly all of the bytes; two checkpoints of one shape that agree in
    embeddings, attention, norms and routers are one model.
    """
    sha = hashlib.sha256()
    for name in reader.names():
        sha.update(f"{name} {reader.shape(name)} {reader.dtype(name)}\n".encode())
        if not is_expert(name):
            sha.update(np.ascontiguousarray(reader.read(name)).tobytes())
    return sha.hexdigest()


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of all token ids and lengths."""
    sha = hashlib.sha256()
    for encoder, decoder in examples:
        for ids in (encoder, decoder):
            sha.update(np.int64(len(ids)).tobytes() + np.asarray(ids, "<i4").tobytes())
    return sha.hexdigest()


def fitted_codebook(reader: Reader, config: CompressionConfig) -> Codebook | None:
    """The codebook of a ternary compression, None for the other grids.

    A Tunstall codebook is fitted to the share of zeros that rounding to nearest leaves in the first expert of each
    compressed layer: GPTQ moves it by a percent or two, which costs less than a thousandth of a bit.
    """
    if config.bits != "ternary":
        return None
    if config.codebook == "upstream":
        return upstream_codebook()
    zeros = total = 0
    for stack in config.compressed_stacks:
        for layer in reader.config.sparse_layers(stack):
            for matrix in (*wide_names(reader.config), "wo"):
                kernel = reader.read(expert_kernel(stack, layer, matrix), slice(0, 1)).astype(np.float32)
                digits = round_to_nearest(
                    kernel.swapaxes(1, 2), config.grid, group_size=config.group_size
                ).digits
                zeros, total = zeros + int((np.asarray(digits) == 0).sum()), total + digits.size
    p_zero = min(max(round(zeros / max(total, 1), 2), 0.34), 0.99)
    return tunstall_codebook(p_zero=p_zero, code_bits=int(config.codebook.removeprefix("tunstall-")))
