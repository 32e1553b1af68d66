"""The packing of each expert matrix, decided before the first one is quantized."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qmoe_jax.artifact.kinds import Kind, Ternary, Uniform
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.coding import Codebook, tunstall_codebook, upstream_codebook
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.config import SwitchConfig
from qmoe_jax.parameters import ExpertKernel, expert_matrices
from qmoe_jax.quantization import round_to_nearest

GPTQ_FEWER_ZEROS = 0.045
"""Share of the weights that round-to-nearest leaves zero and GPTQ makes nonzero: .040 to .051 in every layer
and matrix of switch-mini (`report/layers.png` of the demo). A misfit of this size costs 2 % of code size."""


def packing_kinds(
    config: CompressionConfig, model: SwitchConfig, codebooks: Mapping[str, Codebook]
) -> dict[str, Kind]:
    """Return how `config` packs each matrix of an expert; `codebooks` by matrix, for ternary."""
    size, dtype = config.group_size, config.level_dtype
    if config.bits == "ternary":
        return {matrix: Ternary(codebook.name, size, dtype) for matrix, codebook in codebooks.items()}
    return dict.fromkeys(expert_matrices(model), Uniform(config.bits, size, dtype))


def fitted_codebooks(reader: Checkpoint, config: CompressionConfig) -> dict[str, Codebook]:
    """Return the codebook of each expert matrix (`wi`, `wo`) of a ternary compression; none for other grids.

    Tunstall codebooks are fitted to the sparsity that round-to-nearest leaves in the first expert of each
    compressed stack (layers differ little, and reading one expert of T5X's chunks is expensive), less what
    GPTQ's error feedback turns into nonzeros.
    """
    if config.bits != "ternary":
        return {}
    matrices = expert_matrices(reader.config)
    if config.codebook == "upstream":
        return dict.fromkeys(matrices, upstream_codebook())
    code_bits = int(config.codebook.removeprefix("tunstall-"))
    shift = GPTQ_FEWER_ZEROS if config.method == "gptq" else 0.0
    p_zero = {matrix: _rounded_sparsity(reader, config, matrix) - shift for matrix in matrices}
    # Two digits are fine enough: a misfit of .01 costs a thousandth of a bit.
    rounded = {matrix: min(max(round(p, 2), 0.34), 0.99) for matrix, p in p_zero.items()}
    return {matrix: tunstall_codebook(p_zero=p, code_bits=code_bits) for matrix, p in rounded.items()}


def _rounded_sparsity(reader: Checkpoint, config: CompressionConfig, matrix: str) -> float:
    """Return the share of zeros that round-to-nearest leaves in a matrix of each stack's first expert."""
    zeros = total = 0
    for stack in config.compressed_stacks:
        for layer in reader.config.sparse_layers(stack)[:1]:
            name = ExpertKernel(stack, layer, matrix).path
            kernel = reader.read_finite(name, slice(0, 1), dtype=np.float32)
            digits = round_to_nearest(kernel.swapaxes(1, 2), config.grid, group_size=config.group_size).digits
            zeros, total = zeros + int((np.asarray(digits) == 0).sum()), total + digits.size
    return zeros / max(total, 1)
