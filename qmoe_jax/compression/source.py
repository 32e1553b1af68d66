"""What a compression reads, as digests: a run goes on only with the same checkpoint and the same examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from qmoe_jax.checkpoints.reader import Reader
from qmoe_jax.coding import Codebook, tunstall_codebook, upstream_codebook
from qmoe_jax.compression.calibration import Example
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.parameters import ExpertKernel, expert_matrices, is_expert
from qmoe_jax.quantization import round_to_nearest

GPTQ_FEWER_ZEROS = 0.045
"""How much of the weights GPTQ makes nonzero that rounding to nearest leaves zero: .040 to .051 in every layer and
matrix of switch-mini (`report/layers.png` of the demo). A misfit by as much costs 2 % of the code's size."""


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


def fitted_codebooks(reader: Reader, config: CompressionConfig) -> dict[str, Codebook]:
    """The codebook of each expert matrix (`wi`, `wo`) of a ternary compression; none for the other grids.

    Tunstall codebooks are fitted to the share of zeros that rounding to nearest leaves in the first expert of each
    compressed stack (layers differ little, and T5X's chunks make one expert dear to read), less what GPTQ's feedback
    turns into nonzeros.
    """
    if config.bits != "ternary":
        return {}
    matrices = expert_matrices(reader.config)
    if config.codebook == "upstream":
        return dict.fromkeys(matrices, upstream_codebook())
    code_bits = int(config.codebook.removeprefix("tunstall-"))
    shift = GPTQ_FEWER_ZEROS if config.method == "gptq" else 0.0
    p_zero = {matrix: _zeros_to_nearest(reader, config, matrix) - shift for matrix in matrices}
    # Two digits are fine enough: a misfit of .01 costs a thousandth of a bit.
    rounded = {matrix: min(max(round(p, 2), 0.34), 0.99) for matrix, p in p_zero.items()}
    return {matrix: tunstall_codebook(p_zero=p, code_bits=code_bits) for matrix, p in rounded.items()}


def _zeros_to_nearest(reader: Reader, config: CompressionConfig, matrix: str) -> float:
    """Share of zeros that rounding to nearest leaves in a matrix of the first expert of each compressed layer."""
    zeros = total = 0
    for stack in config.compressed_stacks:
        for layer in reader.config.sparse_layers(stack)[:1]:
            kernel = reader.read(ExpertKernel(stack, layer, matrix).path, slice(0, 1)).astype(np.float32)
            digits = round_to_nearest(kernel.swapaxes(1, 2), config.grid, group_size=config.group_size).digits
            zeros, total = zeros + int((np.asarray(digits) == 0).sum()), total + digits.size
    return zeros / max(total, 1)
