"""One expert group on each device of a mesh: the compiled steps that a wave of groups goes through.

All arrays are divided along their first axes, a group's part on its own device, and every device runs the
program that one device alone would run: the bits do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from pallas_kernels.matmul.epilogue import ACTIVATIONS
from qmoe_jax.config import SwitchConfig
from qmoe_jax.distributed import replicated, split, split_over
from qmoe_jax.models.experts import grouped_hidden, grouped_mlp
from qmoe_jax.models.layers import RMSNorm
from qmoe_jax.quantization import (
    Factor,
    Grid,
    Hessians,
    add_tokens,
    empty_hessians,
    factorize,
    gptq_with_factor,
    relative_error,
    round_to_nearest,
)

Leaf = TypeVar("Leaf")


class Figures(NamedTuple):
    """Figures of one matrix of each expert; see `MatrixReport`."""

    weight_error: Float[Array, "expert"]
    output_error: Float[Array, "expert"]
    sparsity: Float[Array, "expert"]
    fallback: Bool[Array, "expert"]


class Found(NamedTuple):
    """The result of quantization for one matrix of each expert; see `Quantized`."""

    digits: UInt8[Array, "expert out in"]
    levels: Float[Array, "expert out group 2"]
    group_index: Int32[Array, "expert in"]
    figures: Figures


def place(mesh: Mesh, parts: Sequence[np.ndarray]) -> Array:
    """Return arrays of one shape, one per device, as one array divided along its first axis."""
    shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
    placed = [jax.device_put(part, device) for part, device in zip(parts, mesh.devices.flat, strict=True)]
    return jax.make_array_from_single_device_arrays(shape, split(mesh), placed)


def replicate(mesh: Mesh, tree: Leaf) -> Leaf:
    """Return a pytree of arrays with a copy of each on every device."""
    placed: Leaf = jax.device_put(tree, replicated(mesh))
    return placed


def parts_of(array: Array) -> list[Array]:
    """Return what each device holds of a divided array, in the order of the mesh."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [shard.data for shard in shards]


@partial(jax.jit, static_argnames=("mesh", "num_experts", "width"))
def no_hessians(mesh: Mesh, num_experts: int, width: int) -> Hessians:
    """Return the Hessians of no tokens for `num_experts` experts per device."""
    made = split_over(mesh, lambda _, count: empty_hessians(num_experts, width))
    return made(None, jnp.zeros(mesh.size, jnp.int32))


@partial(jax.jit, static_argnames=("mesh", "model"), donate_argnames="hessians")
def calibrate(
    mesh: Mesh,
    model: SwitchConfig,
    scale: Float[Array, "embed"],
    hessians: tuple[Hessians | None, Hessians | None],
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    wi: tuple[Float[Array, "expert embed mlp"], ...],
) -> tuple[tuple[Hessians | None, Hessians | None], Int32[Array, "device"]]:
    """Add a chunk of tokens to the Hessians of both kinds of matrices; **these are donated**.

    Args:
        mesh: the devices.
        model: the architecture.
        scale: of the norm in front of the experts.
        hessians: of the inputs of `wi`, and of those of `wo`; None for one that is not wanted.
        x: hidden states, before the norm.
        expert: counted from the first of the device's group; tokens of none (-1) are ignored.
        wi: the input matrices whose activations are the inputs of `wo`.

    Returns:
        The Hessians, and a number per device that is there when they are.
    """

    def local(scale: Array, mine: tuple) -> tuple:
        (first, second), x, expert, wi = mine
        normed = _norm(model, scale, x)
        if first is not None:
            first = add_tokens(first, normed, expert)
        if second is not None:
            activation = ACTIVATIONS[model.activation]
            hidden = grouped_hidden(normed, jnp.maximum(expert, 0), wi, activation)
            second = add_tokens(second, hidden, expert)
        counted = first if first is not None else second
        return (first, second), counted.counts.sum(keepdims=True)

    result: tuple = split_over(mesh, local)(scale, (hessians, x, expert, wi))
    return result


@partial(jax.jit, static_argnames="mesh")
def all_finite(mesh: Mesh, hessians: Hessians) -> Bool[Array, "expert"]:
    """Return which experts' Hessians are finite."""
    local = lambda _, sums: jnp.isfinite(sums).all(axis=(1, 2))
    return split_over(mesh, local)(None, hessians.sums)


@partial(jax.jit, static_argnames=("mesh", "activation_order"), donate_argnames="hessians")
def factor(mesh: Mesh, hessians: Hessians, damping: float, *, activation_order: bool) -> Factor:
    """Damp and factor the Hessians, which **are donated**."""
    local = lambda damping, sums: factorize(sums, damping, activation_order=activation_order)
    return split_over(mesh, local)(jnp.float32(damping), hessians.sums)


@partial(jax.jit, static_argnames=("mesh", "group_size"))
def quantize(
    mesh: Mesh,
    stored: Float[Array, "expert in out"],
    factor: Factor | None,
    grid: Grid,
    *,
    group_size: int | None,
) -> tuple[Found, Float[Array, "expert in out"]]:
    """Quantize one matrix of each expert as it is stored; without a factor to nearest.

    The transposes here and those inside GPTQ are one program, in which XLA cancels them.

    Returns:
        The result, and its values as they are stored, with levels in float32.
    """

    def local(grid: Grid, mine: tuple) -> tuple[Found, Array]:
        stored, factor = mine
        w = stored.swapaxes(1, 2)
        if factor is None:
            q = round_to_nearest(w, grid, group_size=group_size)
        else:
            q = gptq_with_factor(w, factor, grid, group_size=group_size)
        square = lambda d: jnp.sum(d * d, axis=(1, 2))
        weight_error = square(q.values - w) / jnp.maximum(square(w), jnp.finfo(jnp.float32).tiny)
        sparsity = (q.values == 0).mean(axis=(1, 2))
        figures = Figures(weight_error, relative_error(q, w, factor), sparsity, q.fallback)
        return Found(q.digits, q.levels, q.group_index, figures), q.values.swapaxes(1, 2)

    result: tuple = split_over(mesh, local)(grid, (stored, factor))
    return result


@partial(jax.jit, static_argnames="mesh")
def restore(
    mesh: Mesh,
    digits: UInt8[Array, "expert out in"],
    levels: Float[Array, "expert out group 2"],
    group_index: Int32[Array, "expert in"],
    grid: Grid,
) -> Float[Array, "expert in out"]:
    """Return the values that `quantize` gave, from what it found."""

    def local(grid: Grid, mine: tuple) -> Array:
        digits, levels, group_index = mine
        pair = levels[..., 0], levels[..., 1]
        if levels.shape[2] > 1:
            take = lambda level: jnp.take_along_axis(level, group_index[:, None], axis=2)
            pair = take(pair[0]), take(pair[1])
        return grid.value(digits, pair).swapaxes(1, 2)

    return split_over(mesh, local)(grid, (digits, levels, group_index))


@partial(jax.jit, static_argnames=("mesh", "model"))
def forward(
    mesh: Mesh,
    model: SwitchConfig,
    scale: Float[Array, "embed"],
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    probability: Float[Array, "token"],
    wi: tuple[Float[Array, "expert embed mlp"], ...],
    wo: Float[Array, "expert mlp embed"],
) -> tuple[Float[Array, "token embed"], Bool[Array, "token"]]:
    """Add each token's expert output, scaled by its router probability, to its hidden state.

    Returns:
        The states, and whether the sum of squares of each is finite.
    """

    def local(scale: Array, mine: tuple) -> tuple[Array, Array]:
        x, expert, probability, wi, wo = mine
        normed = _norm(model, scale, x)
        out = grouped_mlp(normed, jnp.maximum(expert, 0), wi, wo, ACTIVATIONS[model.activation])
        y = x + probability[:, None] * out
        return y, sound(y)

    result: tuple = split_over(mesh, local)(scale, (x, expert, probability, wi, wo))
    return result


def sound(x: Float[Array, "*token embed"]) -> Bool[Array, "*token"]:
    """Return which tokens have a finite sum of squares.

    A norm would make zeros of finite states whose squares overflow, and nobody would know.
    """
    return jnp.isfinite(jnp.sum(x * x, axis=-1))


def _norm(model: SwitchConfig, scale: Array, x: Array) -> Array:
    return RMSNorm(model.layer_norm_epsilon, jnp.float32).apply({"params": {"scale": scale}}, x)
