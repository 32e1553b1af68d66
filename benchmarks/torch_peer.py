"""Ternary GPTQ of several experts at once in plain PyTorch, to compare `qmoe_jax.quantization.gptq` with.

Written from the papers' formulas (GPTQ, arXiv 2210.17323, algorithm 1; QMoE, arXiv 2310.16795, section 3.2:
batched over experts): Cholesky, inverse, Cholesky of the inverse, then columns in blocks, each column
compensated at once in its block and each block in all that follow. Every update is in place. The one choice
beyond the formulas is how weights lie in memory while they are quantized: as the papers and their programs
have them, [out, in], or transposed, so that a column is contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 128


class Ternary(NamedTuple):
    """Quantized experts.

    Attributes:
        digits: uint8 [expert, out, in]: 0 for zero, 1 for the row's minimum, 2 for its maximum.
        levels: float32 [expert, out, 2].
        values: float32 [expert, out, in].
    """

    digits: torch.Tensor
    levels: torch.Tensor
    values: torch.Tensor


@torch.inference_mode()
def gptq(
    w: torch.Tensor, hessian: torch.Tensor, damping: float = 0.1, *, transposed: bool = False
) -> Ternary:
    """Quantize the weights of several experts to the ternary grid of QMoE.

    Args:
        w: float32 [expert, out, in]; not changed.
        hessian: float32 [expert, in, in], XᵀX of each expert's inputs, not damped; not changed.
        damping: share of the mean of a Hessian's diagonal that is added to the diagonal.
        transposed: copy the weights so that columns are contiguous.
    """
    upper = upper_factor(hessian, damping)
    low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    low_border, high_border = low / 2, high / 2
    width = w.shape[2]
    # Shape: [expert, in, out]; `clone` keeps the order in memory.
    rest = w.transpose(1, 2).contiguous() if transposed else w.transpose(1, 2).clone()
    digits = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        block, factor = rest[:, start:end], upper[:, start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            column = block[:, i]
            is_high, is_low = column > high_border, column < low_border
            digits[:, start + i] = is_low.byte() + 2 * is_high.byte()
            value = high * is_high + low * is_low
            torch.div(column - value, factor[:, i, i, None], out=errors[:, i])
            column.copy_(value)
            if i + 1 < end - start:
                block[:, i + 1 :].baddbmm_(factor[:, i, i + 1 :, None], errors[:, i, None], alpha=-1)
        if end < width:
            rest[:, end:].baddbmm_(upper[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    levels = torch.stack((low, high), dim=2)
    return Ternary(digits.transpose(1, 2), levels, rest.transpose(1, 2))


def upper_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper triangular U of each expert with UᵀU the inverse of the damped Hessian."""
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.mean(1, keepdim=True)).clamp(min=1e-6)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
