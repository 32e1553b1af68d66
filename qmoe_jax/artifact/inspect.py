"""Counts what a checkpoint holds, and estimates the memory that it would need, compressed or not."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Mapping

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.config import PRESETS, SwitchConfig
from qmoe_jax.files.tensor import Shard
from qmoe_jax.parameters import STACKS, is_expert

_BFLOAT16_BYTES = 2
# Bits of a row (one output of one expert) beside its digits: two bfloat16 levels and, where there are
# codewords, an int32 offset.
_CODED_ROW_BITS, _PLAIN_ROW_BITS = 64, 32
# Bits per weight of the digits. Coded ternary ones were measured on 20 million digits with a sparsity of
# 88.5 %, as in the published models; another sparsity makes another size.
FORMS: Mapping[str, tuple[float, int]] = {
    "ternary, 8-bit codewords": (0.701, _CODED_ROW_BITS),
    "ternary, upstream's dictionary": (0.735, _CODED_ROW_BITS),
    "2 bits": (2, _PLAIN_ROW_BITS),
    "3 bits": (3, _PLAIN_ROW_BITS),
    "4 bits": (4, _PLAIN_ROW_BITS),
}
"""Compressed forms of the experts -> (bits per weight, bits per row)."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a stack: its number of experts (0 in a dense layer) and of parameters."""

    stack: str
    index: int
    experts: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers.

    Attributes:
        path, format, config: of the checkpoint.
        preset: the published model of this architecture, if there is one.
        layers: every layer, the encoder's first.
        parameters, expert_parameters: numbers of parameters, in all and of the experts.
        dtypes: stored dtype -> number of parameters.
        files, bytes_on_disk: of the parameters; None where the format or the location does not tell.
        damaged: files that are missing or cut short, with what is wrong.
        memory: form of the experts -> bytes of the model with everything else in bfloat16 (estimated if
            compressed).
        notes: what opening the checkpoint had to decide.
    """

    path: str
    format: str
    preset: str | None
    config: SwitchConfig
    layers: tuple[Layer, ...]
    parameters: int
    expert_parameters: int
    dtypes: Mapping[str, int]
    files: int | None
    bytes_on_disk: int | None
    damaged: tuple[Shard, ...]
    memory: Mapping[str, int]
    notes: tuple[str, ...]


def inspect(checkpoint: str | os.PathLike[str] | Checkpoint) -> Inspection:
    """Count what a checkpoint holds, from shapes and file sizes: no tensor is read.

    Damaged files are listed in `damaged`. A checkpoint that is passed opened must have been opened with
    `check=False` for that, or it would have been refused.

    Raises:
        CheckpointError: the checkpoint is missing, or its index is damaged.
    """
    checkpoint = open_checkpoint(checkpoint, check=False)
    sizes = {name: math.prod(checkpoint.shape(name)) for name in checkpoint.names()}
    experts = {name: size for name, size in sizes.items() if is_expert(name)}
    dtypes: collections.Counter[str] = collections.Counter()
    for name, size in sizes.items():
        dtypes[checkpoint.dtype(name).name] += size
    shards = checkpoint.shards()
    known = [shard.nbytes for shard in shards if shard.nbytes is not None]
    return Inspection(
        path=str(checkpoint.path),
        format=checkpoint.format,
        preset=next((name for name, preset in PRESETS.items() if preset == checkpoint.config), None),
        config=checkpoint.config,
        layers=tuple(_layers(checkpoint.config, sizes)),
        parameters=sum(sizes.values()),
        expert_parameters=sum(experts.values()),
        dtypes=dict(dtypes),
        files=len(shards) if shards else None,
        bytes_on_disk=sum(known) if known else None,
        damaged=tuple(shard for shard in shards if shard.problem),
        memory=_memory(checkpoint, experts, sum(sizes.values()) - sum(experts.values())),
        notes=tuple(checkpoint.notes),
    )


def _layers(config: SwitchConfig, sizes: Mapping[str, int]) -> list[Layer]:
    parameters: collections.Counter[str] = collections.Counter()
    for name, size in sizes.items():
        parameters["/".join(name.split("/")[:2])] += size
    return [
        Layer(
            stack,
            i,
            config.num_experts if i in config.sparse_layers(stack) else 0,
            parameters[f"{stack}/layers_{i}"],
        )
        for stack in STACKS
        for i in range(config.num_layers(stack))
    ]


def _memory(checkpoint: Checkpoint, experts: Mapping[str, int], rest: int) -> dict[str, int]:
    weights = sum(experts.values())
    # An expert kernel is [expert, in, out], so its rows are its experts times its outputs.
    rows = sum(checkpoint.shape(name)[0] * checkpoint.shape(name)[2] for name in experts)
    memory = {"bfloat16": (weights + rest) * _BFLOAT16_BYTES}
    for form, (weight_bits, row_bits) in FORMS.items():
        memory[form] = rest * _BFLOAT16_BYTES + math.ceil((weights * weight_bits + rows * row_bits) / 8)
    return memory
