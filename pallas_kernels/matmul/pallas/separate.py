"""The Pallas kernel for few tokens per expert: warps decode rows for one token.

The token's expert is read on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.backend import triton_parameters
from pallas_kernels.matmul.epilogue import Epilogue
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import PackedRefs, multiply_add


@dataclasses.dataclass(frozen=True)
class Config(tuning.Config):
    """A launch of programs that each take `rows` rows of one token, `tile` codewords of each at a time."""

    kind: ClassVar[str] = "separate"

    rows: int
    tile: int
    warps: int

    @classmethod
    def heuristic(cls, problem: tuning.Problem) -> Config:
        """Return one row per warp, so that sums over 32 codewords stay inside the warp. Not measured."""
        del problem
        return cls(rows=4, tile=32, warps=4)


def product(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert: Int32[Array, "t"],
    epilogue: Epilogue,
    dtype: Any,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """Multiply in `dtype`, with an epilogue whose gate is [t, out] and scale [t].

    Experts must be in range.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, packed.rows), dtype)
    config = tuning.choose(Config, tuning.Problem.of(Config.kind, packed, x.dtype), config)
    return pl.pallas_call(
        functools.partial(_kernel, config=config, compiled=not interpret),
        grid=(pl.cdiv(packed.rows, config.rows), x.shape[0]),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], packed.rows), dtype),
        compiler_params=triton_parameters(num_warps=config.warps),
        interpret=interpret,
        name="packed_matmul_separate",
    )(PackedRefs.of(packed), expert, x, epilogue)


def _kernel(
    packed: PackedRefs, experts: Any, x: Any, epilogue: Epilogue, y: Any, *, config: Any, compiled: bool
) -> None:
    token = pl.program_id(1)
    row = pl.program_id(0) * config.rows + jnp.arange(config.rows)
    inside = row < packed.rows
    expert = experts[token]
    low, high = packed.level_pair(expert, row, inside)

    def visit(position: Array, digit: Array, total: Array) -> Array:
        value = plt.load(x.at[token, position], mask=digit != 0, other=0).astype(jnp.float32)
        level = jnp.where(digit == 2, high[:, None], low[:, None])
        return multiply_add(value, level, total, compiled=compiled)

    total = jnp.zeros((config.rows, config.tile), jnp.float32)
    total = jnp.sum(packed.visit(expert, row, config.tile, visit, total, inside), axis=1)
    gate_at = lambda gate: plt.load(gate.at[token, row], mask=inside, other=0)
    total = epilogue.finish(total, gate_at, lambda scale: scale[token])
    plt.store(y.at[token, row], total.astype(y.dtype), mask=inside)
