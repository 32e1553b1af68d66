"""The Pallas kernel for some tokens per expert: a warp decodes a row once for a block of tokens.

A nonzero costs one load of the block's activations, which lie side by side, and one multiplication per token.
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
    """A launch of programs that take one row for `lanes` tokens each, `tile` codewords at a time."""

    kind: ClassVar[str] = "gather"

    tile: int
    lanes: int
    warps: int

    @classmethod
    def heuristic(cls, problem: tuning.Problem) -> Config:
        """Return blocks of 8 to 32 tokens, as many as an expert has on average. Not measured."""
        return cls(tile=32, lanes=min(max(8, problem.tokens_per_expert), 32), warps=1)


def product(
    packed: PackedMatrix,
    x: Float[Array, "block in lanes"],
    block_expert: Int32[Array, "block"],
    epilogue: Epilogue,
    dtype: Any,
    *,
    config: Config,
    interpret: bool = False,
) -> Float[Array, "block out lanes"]:
    """Multiply in `dtype`, with an epilogue whose gate is [block, out, lanes] and scale [block, lanes].

    Blocks of expert -1 are not written.
    """
    blocks = block_expert.shape[0]
    return pl.pallas_call(
        functools.partial(_kernel, config=config, compiled=not interpret),
        grid=(packed.rows, blocks),
        out_shape=jax.ShapeDtypeStruct((blocks, packed.rows, config.lanes), dtype),
        compiler_params=triton_parameters(num_warps=config.warps),
        interpret=interpret,
        name="packed_matmul_gather",
    )(PackedRefs.of(packed), block_expert, x, epilogue)


def _kernel(
    packed: PackedRefs, experts: Any, x: Any, epilogue: Epilogue, y: Any, *, config: Any, compiled: bool
) -> None:
    row, block = pl.program_id(0), pl.program_id(1)
    expert = experts[block]

    @pl.when(expert >= 0)
    def _() -> None:
        low, high = packed.level_pair(expert, row)
        lane = jnp.arange(config.lanes)[None, :]

        def visit(position: Array, digit: Array, total: Array) -> Array:
            there = (digit != 0)[:, None]
            value = plt.load(x.at[block, position[:, None], lane], mask=there, other=0).astype(jnp.float32)
            level = jnp.where(digit == 2, high, low)[:, None]
            return multiply_add(value, level, total, compiled=compiled)

        total = jnp.zeros((config.tile, config.lanes), jnp.float32)
        total = jnp.sum(packed.visit(expert, row, config.tile, visit, total), axis=0)
        lanes = pl.ds(0, config.lanes)
        gate_at = lambda gate: plt.load(gate.at[block, row, lanes])
        total = epilogue.finish(total, gate_at, lambda scale: plt.load(scale.at[block, lanes]))
        plt.store(y.at[block, row, lanes], total.astype(y.dtype))
