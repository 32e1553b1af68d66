"""Unpacking by Pallas on a GPU: a warp clears a row, then scatters the nonzeros of its codewords."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.backend import triton_parameters
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import PackedRefs

CLEARED = 1024  # elements cleared at a time


@dataclasses.dataclass(frozen=True)
class Config(tuning.Config):
    """A launch of programs that each take one row, `tile` codewords at a time, with `warps` warps."""

    kind: ClassVar[str] = "unpack"

    tile: int
    warps: int

    @classmethod
    def heuristic(cls, problem: tuning.Problem) -> Config:
        """Return one warp per row, four codewords per thread. Not measured."""
        del problem
        return cls(tile=128, warps=1)


def unpack(
    packed: PackedMatrix,
    dtype: np.dtype,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "expert out in"]:
    """Decode as `pallas_kernels.unpack` does."""
    config = tuning.choose(Config, tuning.Problem.of(Config.kind, packed, dtype), config)
    return pl.pallas_call(
        functools.partial(_kernel, tile=config.tile, barrier=not interpret),
        grid=(packed.rows, packed.num_experts),
        out_shape=jax.ShapeDtypeStruct((packed.num_experts, packed.rows, packed.width), dtype),
        compiler_params=triton_parameters(num_warps=config.warps),
        interpret=interpret,
        name="unpack",
    )(PackedRefs.of(packed))


def _kernel(packed: PackedRefs, y: Any, *, tile: int, barrier: bool) -> None:
    row, expert = pl.program_id(0), pl.program_id(1)
    low, high = (level.astype(y.dtype) for level in packed.level_pair(expert, row))
    for start in range(0, packed.width, CLEARED):
        column = start + jnp.arange(CLEARED)
        zeros = jnp.zeros(CLEARED, y.dtype)
        plt.store(y.at[expert, row, column], zeros, mask=column < packed.width)
    if barrier:  # interpret mode has no rule for it, and runs in order
        plt.debug_barrier()

    def visit(position: Array, digit: Array, carry: None) -> None:
        plt.store(y.at[expert, row, position], jnp.where(digit == 2, high, low), mask=digit != 0)

    packed.visit(expert, row, tile, visit, None)
