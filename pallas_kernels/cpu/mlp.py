"""An expert as a whole, on NumPy arrays and outside XLA: what a store of experts in host memory calls."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32

from pallas_kernels.cpu.product import product
from pallas_kernels.cpu.token_blocks import grouped
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
    """Writes `scale * (wo @ activation(wi @ x))` into `y`, from any thread; see `pallas_kernels.packed_mlp`.

    The matrices hold NumPy arrays anywhere in memory, which are read where they lie; between the last row of
    an expert and the next expert there may be anything. `expert_index` must be in range.

    Args:
      wi: one matrix, or two: the gated expert multiplies by the second one's product.
      activation: "linear", "relu" or "gelu" (the tanh form).
    """
    blocks = grouped(expert_index)
    data = blocks.spread(x)
    hidden = product(wi[0], blocks, data, activation)
    for gate in wi[1:]:
        hidden *= product(gate, blocks, data)
    blocks.collect(product(wo, blocks, hidden), scale, y)
