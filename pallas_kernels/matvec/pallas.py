"""Pallas on a GPU: warps decode rows for one token, whose expert they read on the device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.backend import triton_parameters
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.operands import PackedMatrix
from pallas_kernels.tiles import Streams, multiply_add


def matvec(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert_index: Int32[Array, "t"],
    *,
    config: tuning.MatvecConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """See `packed_matvec`."""
    expert = jnp.clip(expert_index, 0, packed.num_experts - 1)
    return product(packed, x, expert, Epilogue(), x.dtype, config=config, interpret=interpret)


def product(
    packed: PackedMatrix,
    x: Float[Array, "t in"],
    expert: Int32[Array, "t"],
    epilogue: Epilogue,
    dtype: Any,
    *,
    config: tuning.MatvecConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "t out"]:
    """The product in `dtype`, finished by an epilogue whose gate is [t, out] and scale [t]; experts in range."""
    if x.shape[0] == 0:
        return jnp.zeros((0, packed.rows), dtype)
    config = tuning.choose(tuning.Problem.of("matvec", packed, x.dtype), config)
    return pl.pallas_call(
        functools.partial(_kernel, config=config, compiled=not interpret),
        grid=(pl.cdiv(packed.rows, config.rows), x.shape[0]),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], packed.rows), dtype),
        compiler_params=triton_parameters(num_warps=config.warps),
        interpret=interpret,
        name="packed_matvec",
    )(Streams.of(packed), expert, x, epilogue)


def _kernel(
    streams: Streams, experts: Any, x: Any, epilogue: Epilogue, y: Any, *, config: Any, compiled: bool
) -> None:
    token = pl.program_id(1)
    row = pl.program_id(0) * config.rows + jnp.arange(config.rows)
    inside = row < streams.rows
    expert = experts[token]
    low, high = streams.level_pair(expert, row, inside)

    def visit(position: Array, digit: Array, total: Array) -> Array:
        value = plt.load(x.at[token, position], mask=digit != 0, other=0).astype(jnp.float32)
        level = jnp.where(digit == 2, high[:, None], low[:, None])
        return multiply_add(value, level, total, compiled=compiled)

    total = jnp.zeros((config.rows, config.tile), jnp.float32)
    total = jnp.sum(streams.visit(expert, row, config.tile, visit, total, inside), axis=1)
    gate_at = lambda gate: plt.load(gate.at[token, row], mask=inside, other=0)
    total = epilogue.finish(total, gate_at, lambda scale: scale[token])
    plt.store(y.at[token, row], total.astype(y.dtype), mask=inside)
