"""Quantization and packing of one expert group: Hessians from its tokens, GPTQ, codewords."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.matmul.epilogue import ACTIVATIONS
from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import LEVEL_DTYPES, Kind
from qmoe_jax.artifact.matrices import PackedExpertMatrix, pack_quantized
from qmoe_jax.artifact.report import MatrixReport
from qmoe_jax.coding import Codebook
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.tokens import GroupTokens
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.finite import read_as
from qmoe_jax.models.experts import grouped_hidden
from qmoe_jax.parameters import ExpertKernel, expert_matrices, input_matrices
from qmoe_jax.quantization import (
    Factor,
    Grid,
    Quantized,
    add_tokens,
    empty_hessians,
    factorize,
    gptq_with_factor,
    relative_error,
    round_to_nearest,
)

Weights = dict[str, np.ndarray]
"""Matrices of an expert group by name, float32 `[expert, in, out]` as T5X has them."""


@dataclasses.dataclass(frozen=True)
class CompressedGroup:
    """A quantized expert group.

    Attributes:
        experts: the packed matrices of each expert, levels rounded as they are stored.
        values: the quantized weights with levels in float32.
        levels: those levels by matrix, float32 `[expert, out, group, 2]`.
        reports: figures of each matrix.
    """

    experts: list[dict[str, PackedExpertMatrix]]
    values: Weights
    levels: dict[str, np.ndarray]
    reports: dict[str, MatrixReport]


@partial(jax.jit, static_argnames="activation")
def _hidden(x: Array, expert: Array, inputs: Sequence[Array], activation: str) -> Array:
    return grouped_hidden(x, jnp.maximum(expert, 0), inputs, ACTIVATIONS[activation])


def _factor(
    tokens: GroupTokens,
    num_experts: int,
    inputs: Sequence[Array] | None,
    model: SwitchConfig,
    config: CompressionConfig,
    refuse: Callable[[int], CheckpointError],
) -> Factor:
    """Factor XᵀX of the group's calibration tokens, of their states or of the activations behind `inputs`.

    Raises what `refuse` returns for an expert whose XᵀX is not finite.
    """
    width = tokens.x.shape[1] if inputs is None else inputs[0].shape[2]
    hessians = empty_hessians(num_experts, width)
    for x, expert in tokens.calibration().chunks():
        columns = x if inputs is None else _hidden(x, expert, inputs, model.activation)
        hessians = add_tokens(hessians, columns, expert)
    finite = np.asarray(_finite(hessians.sums))
    if not finite.all():
        raise refuse(int(finite.argmin()))
    return factorize(hessians.sums, config.damping, activation_order=config.activation_order)


@jax.jit
def _finite(hessians: Float[Array, "expert in in"]) -> Bool[Array, "expert"]:
    return jnp.isfinite(hessians).all(axis=(1, 2))


class _Figures(NamedTuple):
    """Figures of one matrix of a group; see `MatrixReport`."""

    weight_error: Float[Array, "expert"]
    output_error: Float[Array, "expert"]
    sparsity: Float[Array, "expert"]


@partial(jax.jit, static_argnames="group_size")
def _quantize(
    stored: Float[Array, "expert in out"], factor: Factor | None, grid: Grid, group_size: int | None
) -> tuple[Quantized, Float[Array, "expert in out"], _Figures]:
    """Quantize one matrix of a group as it is stored; without a factor to nearest.

    The transposes here and those inside GPTQ are one program, in which XLA cancels them.

    Returns:
        The result, its values as they are stored, and its figures.
    """
    w = stored.swapaxes(1, 2)
    if factor is None:
        q = round_to_nearest(w, grid, group_size=group_size)
    else:
        q = gptq_with_factor(w, factor, grid, group_size=group_size)
    square = lambda d: jnp.sum(d * d, axis=(1, 2))
    weight_error = square(q.values - w) / jnp.maximum(square(w), jnp.finfo(jnp.float32).tiny)
    sparsity = (q.values == 0).mean(axis=(1, 2))
    return q, q.values.swapaxes(1, 2), _Figures(weight_error, relative_error(q, w, factor), sparsity)


def _overflows(path: object, key: GroupKey, matrix: str, expert: int) -> CheckpointError:
    """Return the error for an expert of a group whose Hessian is not finite."""
    return CheckpointError(
        "the inputs of an expert's matrix overflow on the calibration tokens",
        path=path,
        key=f"{ExpertKernel(key.stack, key.layer, matrix).path}, expert {key.start + expert}",
        expected="sums of squares that are finite in float32",
        found="infinity or NaN",
        remedy="the weights in front of it are too large: take another copy of the checkpoint, or quantize "
        "without Hessians (method nearest)",
    )


def compress_group(
    weights: Weights,
    tokens: GroupTokens | None,
    model: SwitchConfig,
    config: CompressionConfig,
    kinds: Mapping[str, Kind],
    codebooks: Mapping[str, Codebook],
    path: object,
    key: GroupKey,
) -> CompressedGroup:
    """Quantize and pack an expert group; `tokens` None rounds to nearest.

    Each Hessian is factored once: gated experts use one factor for both input matrices. Memory beside the
    weights: one Hessian per expert, `[d_ff, d_ff]` float32 at the largest, three times while it is factored.

    Raises:
        CheckpointError: a Hessian is not finite, or a level in the dtype that it is stored in; it names the
            checkpoint by `path`, and layer and expert by `key`.
    """
    num_experts = len(weights["wo"])
    packed: dict[str, list[PackedExpertMatrix]] = {}
    reports: dict[str, MatrixReport] = {}
    values: Weights = {}
    levels: dict[str, np.ndarray] = {}
    inputs = [jnp.asarray(weights[name]) for name in input_matrices(model)]
    refuse = partial(_overflows, path, key)
    factor = None
    if tokens is not None:
        first = partial(refuse, input_matrices(model)[0])
        factor = _factor(tokens, num_experts, None, model, config, first)
    for name in expert_matrices(model):
        if name == "wo" and tokens is not None:
            factor = None  # the first factor is dropped before the larger Hessian is made
            factor = _factor(tokens, num_experts, inputs, model, config, partial(refuse, name))
        stored = jnp.asarray(weights[name])
        quantized, stored_values, figures = _quantize(stored, factor, config.grid, config.group_size)
        levels[name] = np.asarray(quantized.levels)
        level_dtype = LEVEL_DTYPES[kinds[name].level_dtype]
        where = f"{ExpertKernel(key.stack, key.layer, name).path}, levels"
        read_as(levels[name], level_dtype, path=path, key=where, first=key.start)
        packed[name] = pack_quantized(kinds[name], quantized, codebooks)
        reports[name] = MatrixReport(
            **{field: _entries(figure) for field, figure in figures._asdict().items()},
            bytes=tuple(matrix.nbytes for matrix in packed[name]),
            fallback=_entries(quantized.fallback & (config.method == "gptq")),
        )
        values[name] = np.asarray(stored_values)
        if config.true_sequential and name != "wo":
            inputs[input_matrices(model).index(name)] = stored_values
    experts = [{name: packed[name][e] for name in packed} for e in range(num_experts)]
    return CompressedGroup(experts, values, levels, reports)


def _entries(array: Array) -> tuple[Any, ...]:
    return tuple(np.asarray(array).tolist())
