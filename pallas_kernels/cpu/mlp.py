"""Whole experts on NumPy arrays, outside XLA, for stores of experts in host memory."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32

from pallas_kernels.cpu.packed_product import packed_product
from pallas_kernels.cpu.token_blocks import TokenBlocks
from pallas_kernels.operands import PackedMatrix


def expert_mlp(
    wi: tuple[PackedMatrix, ...],
    wo: PackedMatrix,
    x: Float32[np.ndarray, "t d_model"],
    expert_index: Int32[np.ndarray, "t"],
    scale: Float32[np.ndarray, "t"],
    y: Float32[np.ndarray, "t d_model"],
    *,
    activation: str,
) -> None:
    """Write `scale * (wo @ activation(wi @ x))` of each token's expert into `y`, as `packed_mlp` does.

    Any number of threads may call it at once. The matrices hold NumPy arrays anywhere in memory, which are
    read where they lie; between the last row of an expert and the next expert there may be anything. It takes
    memory for the tokens' inputs, activations and outputs, whose lanes are rounded up to 8, 16, 32 or 64 per
    expert.

    Args:
        wi: one matrix [d_ff, d_model], or two: the gated expert multiplies by the second one's product.
        wo: the matrix [d_model, d_ff].
        x: the tokens.
        expert_index: the expert of each token, which must exist.
        scale: a factor for each token's result, the router's probability. A token of scale 0 is not computed:
            its result is 0.
        y: receives the result.
        activation: "linear", "relu" or "gelu" (the tanh form).
    """
    y[scale == 0] = 0
    blocks = TokenBlocks.by_expert(expert_index, np.flatnonzero(scale))
    x_blocks = blocks.dispatch(x)
    hidden = packed_product(wi[0], blocks, x_blocks, activation)
    for gate in wi[1:]:
        hidden *= packed_product(gate, blocks, x_blocks)
    blocks.combine(packed_product(wo, blocks, hidden), scale, y)
