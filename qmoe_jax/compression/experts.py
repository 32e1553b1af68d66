"""One expert group: Hessians from its tokens, GPTQ, packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from qmoe_jax.artifact.kinds import Kind, Ternary, Uniform
from qmoe_jax.artifact.matrices import PackedExpertMatrix, pack_quantized
from qmoe_jax.coding import Codebook
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.config import SwitchConfig
from qmoe_jax.inference.blockwise.experts import token_chunks
from qmoe_jax.models.experts import ACTIVATIONS, grouped_hidden
from qmoe_jax.parameters import expert_matrices, input_matrices
from qmoe_jax.quantization import Quantized, add_tokens, empty_hessians, gptq, round_to_nearest

Weights = dict[str, np.ndarray]
"""Matrices of an expert group by name, float32 `[expert, in, out]` as T5X has them."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of an expert group: `x` float32 `[token, d_model]`, normed, and the rest `[token]`.

    `expert` counts from the group's first; `calibrates` says which tokens may enter its Hessians.
    """

    x: np.ndarray
    expert: np.ndarray
    calibrates: np.ndarray

    def chunks(self) -> Iterator[tuple[slice, Tokens]]:
        """Parts of one shape, so that a step compiles once: the last is padded with tokens of no expert (-1)."""
        for part, pad in token_chunks(len(self.expert)):
            yield (
                part,
                Tokens(
                    np.pad(self.x[part], ((0, pad), (0, 0))),
                    np.pad(self.expert[part], (0, pad), constant_values=-1),
                    np.pad(self.calibrates[part], (0, pad)),
                ),
            )


@dataclasses.dataclass(frozen=True)
class MatrixRecord:
    """What became of one matrix of an expert group; lists have one number an expert.

    `weight_error` is ‖Q - W‖² / ‖W‖², `output_error` tr(D H Dᵀ) / tr(W H Wᵀ) with the damped Hessian H, D = Q - W
    (equal without calibration);
    `zeros` is the share of zero digits, `bytes` all that is stored; `fallback` marks experts rounded to nearest
    because they had no calibration tokens or a Hessian without a factor.
    """

    weight_error: list[float]
    output_error: list[float]
    zeros: list[float]
    bytes: list[int]
    fallback: list[bool]


@dataclasses.dataclass(frozen=True)
class CompressedGroup:
    """What `compress_group` makes: `experts` as they are stored, `values` with unrounded levels, those `levels`."""

    experts: list[dict[str, PackedExpertMatrix]]
    values: Weights
    levels: dict[str, np.ndarray]
    records: dict[str, MatrixRecord]


def packing_kinds(
    config: CompressionConfig, model: SwitchConfig, codebooks: Mapping[str, Codebook]
) -> dict[str, Kind]:
    """How `config` packs each matrix of an expert; `codebooks` by matrix, for ternary."""
    size, dtype = config.group_size, config.level_dtype
    if config.bits == "ternary":
        return {matrix: Ternary(codebook.name, size, dtype) for matrix, codebook in codebooks.items()}
    return dict.fromkeys(expert_matrices(model), Uniform(config.bits, size, dtype))


@partial(jax.jit, static_argnames="activation")
def _hidden(x: Array, expert: Array, wide: Sequence[Array], activation: str) -> Array:
    return grouped_hidden(x, jnp.maximum(expert, 0), wide, ACTIVATIONS[activation])


def _hessian(tokens: Tokens, num_experts: int, wide: Sequence[Array] | None, activation: str) -> Array:
    """XᵀX of the group's calibration tokens: of their inputs, or of the hidden states behind `wide`."""
    width = tokens.x.shape[1] if wide is None else wide[0].shape[2]
    hessians = empty_hessians(num_experts, width)
    chosen = tokens.calibrates
    for _, part in Tokens(tokens.x[chosen], tokens.expert[chosen], chosen[chosen]).chunks():
        x = part.x if wide is None else _hidden(part.x, part.expert, wide, activation)
        hessians = add_tokens(hessians, x, part.expert)
    return hessians.sums


def _ratio(a: Array, b: Array) -> Array:
    return a / jnp.maximum(b, jnp.finfo(jnp.float32).tiny)


@jax.jit
def _weight_error(w: Array, q: Array) -> Array:
    """‖q - w‖² / ‖w‖² `[expert]`."""
    square = lambda d: jnp.sum(d * d, axis=(1, 2))
    return _ratio(square(q - w), square(w))


@jax.jit
def _output_error(w: Array, q: Array, hessian: Array, damping: float) -> Array:
    """tr(d H dᵀ) / tr(w H wᵀ) `[expert]`, with d = q - w and H damped as GPTQ damps it."""
    diagonal = jnp.diagonal(hessian, axis1=1, axis2=2).mean(-1)
    floor = jnp.where(diagonal > 0, damping * diagonal, 1.0)  # without tokens, the identity
    energy = lambda d: jnp.sum((d @ hessian + floor[:, None, None] * d) * d, axis=(1, 2))
    return _ratio(energy(q - w), energy(w))


def quantize_matrix(
    kernel: np.ndarray, hessian: Array | None, config: CompressionConfig
) -> tuple[Quantized, Array, Array]:
    """Quantize a matrix of a group, `[expert, in, out]`, without a Hessian to nearest; its weight and output errors."""
    w = jnp.asarray(kernel).swapaxes(1, 2)
    if hessian is None:
        quantized = round_to_nearest(w, config.grid, group_size=config.group_size)
        error = _weight_error(w, quantized.values)
        return quantized, error, error
    quantized = gptq(
        w,
        hessian,
        config.grid,
        damping=config.damping,
        group_size=config.group_size,
        activation_order=config.activation_order,
    )
    return (
        quantized,
        _weight_error(w, quantized.values),
        _output_error(w, quantized.values, hessian, config.damping),
    )


def compress_group(
    weights: Weights,
    tokens: Tokens | None,
    model: SwitchConfig,
    config: CompressionConfig,
    kinds: Mapping[str, Kind],
    codebooks: Mapping[str, Codebook],
) -> CompressedGroup:
    """Quantize and pack an expert group; `tokens` None rounds to nearest.

    Memory beside the weights: one Hessian an expert, `[d_ff, d_ff]` float32 at the largest, twice in GPTQ.
    """
    num_experts = len(weights["wo"])
    packed: dict[str, list[PackedExpertMatrix]] = {}
    records: dict[str, MatrixRecord] = {}
    values: Weights = {}
    levels: dict[str, np.ndarray] = {}
    wide = [jnp.asarray(weights[name]) for name in input_matrices(model)]
    first = None if tokens is None else _hessian(tokens, num_experts, None, model.activation)
    for name in expert_matrices(model):
        hessian = first
        if name == "wo" and tokens is not None:
            hessian = first = None  # the first Hessian is dropped before the larger one is made
            hessian = _hessian(tokens, num_experts, wide, model.activation)
        quantized, weight_error, output_error = quantize_matrix(weights[name], hessian, config)
        packed[name] = pack_quantized(kinds[name], quantized, codebooks)
        records[name] = MatrixRecord(
            weight_error=np.asarray(weight_error).tolist(),
            output_error=np.asarray(output_error).tolist(),
            zeros=np.asarray((quantized.values == 0).mean(axis=(1, 2))).tolist(),
            bytes=[matrix.nbytes for matrix in packed[name]],
            fallback=(np.asarray(quantized.fallback) & (config.method == "gptq")).tolist(),
        )
        values[name] = np.asarray(quantized.values.swapaxes(1, 2))
        levels[name] = np.asarray(quantized.levels)
        if config.true_sequential and name != "wo":
            wide[input_matrices(model).index(name)] = quantized.values.swapaxes(1, 2)
    experts = [{name: packed[name][e] for name in packed} for e in range(num_experts)]
    return CompressedGroup(experts, values, levels, records)
