"""The product on a CPU, by the numba kernel."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.cpu.matmul import multiply
from pallas_kernels.operands import PackedMatrix


def packed_matmul(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """Multiply as `pallas_kernels.packed_matmul` does; tokens of one expert share a pass over its codewords."""
    return multiply(packed, x, expert_index, group=True)
