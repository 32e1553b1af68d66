"""The numba kernel on a CPU: a pass over the codewords for each token."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.cpu.matmul import multiply
from pallas_kernels.operands import PackedMatrix


def matvec(
    packed: PackedMatrix, x: Float[Array, "t in"], expert_index: Int32[Array, "t"]
) -> Float[Array, "t out"]:
    """See `packed_matvec`."""
    return multiply(packed, x, expert_index, group=False)
